//! Each file that is kept for a target, given to it. The tests of the command include this file, too.

use std::fs;
use std::path::Path;

pub(crate) fn replay(targets: &[super::Target]) {
    for (name, target) in targets {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(name);
        let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let mut given = 0;
        for file in files {
            let path = file.unwrap().path();
            // Shown only if the test fails.
            println!("{}", path.display());
            target(&fs::read(path).unwrap());
            given += 1;
        }
        assert!(given > 0, "nothing is kept for {name}");
        // What everything begins with.
        target(&[]);
    }
}
