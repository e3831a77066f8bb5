//! Unit files as systemd reads them, for where it does not run: sections, lists that an empty value resets, lines that
//! go on, drop-ins. `systemd.syntax(7)`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// In the order in which systemd looks.
const DIRECTORIES: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// The settings of the section `[Service]`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct UnitFile(BTreeMap<String, Vec<String>>);

impl UnitFile {
    /// A unit file with its drop-ins. A name without a slash is looked for where systemd looks.
    pub(super) fn read(named: &str) -> io::Result<Self> {
        let path = find(named)?;
        let mut unit = Self::default();
        unit.parse(&fs::read_to_string(&path)?);
        for drop_in in drop_ins(&path) {
            unit.parse(&fs::read_to_string(drop_in)?);
        }
        Ok(unit)
    }

    pub(super) fn parse(&mut self, text: &str) {
        let mut in_service = false;
        for line in joined(text) {
            if let Some(section) = line.strip_prefix('[') {
                in_service = section.starts_with("Service]");
            } else if let (true, Some((name, value))) = (in_service, line.split_once('=')) {
                let values = self.0.entry(name.trim().to_owned()).or_default();
                match value.trim() {
                    "" => values.clear(),
                    value => values.push(value.to_owned()),
                }
            }
        }
    }

    pub(super) fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The last one counts.
    pub(super) fn one(&self, name: &str) -> Option<&str> {
        self.all(name).last().map(String::as_str)
    }
}

/// Lines without comments, those that end with a backslash put together.
fn joined(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = String::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        match line.strip_suffix('\\') {
            Some(part) => {
                open.push_str(part);
                open.push(' ');
            }
            None => lines.push(std::mem::take(&mut open) + line),
        }
    }
    lines.push(open);
    lines
}

fn find(named: &str) -> io::Result<PathBuf> {
    if named.contains('/') {
        return Ok(PathBuf::from(named));
    }
    let name = if named.ends_with(".service") { named.to_owned() } else { format!("{named}.service") };
    let candidates = DIRECTORIES.iter().map(|directory| Path::new(directory).join(&name));
    candidates.into_iter().find(|path| path.exists()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// `NAME.d/*.conf`, by name; a file of an earlier directory hides those of the later ones.
fn drop_ins(unit: &Path) -> Vec<PathBuf> {
    let Some(name) = unit.file_name() else { return vec![] };
    let mut below = name.to_owned();
    below.push(".d");
    let mut found = BTreeMap::new();
    let own = unit.parent().map(Path::to_path_buf);
    let is_installed = own.as_deref().is_some_and(|own| DIRECTORIES.iter().any(|one| Path::new(one) == own));
    let others = DIRECTORIES.iter().map(PathBuf::from).filter(|_| is_installed);
    let directories: Vec<PathBuf> = if is_installed { others.collect() } else { own.into_iter().collect() };
    for directory in directories {
        for entry in fs::read_dir(directory.join(&below)).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "conf") {
                found.entry(entry.file_name()).or_insert_with(|| entry.path());
            }
        }
    }
    found.into_values().collect()
}

/// A time span as systemd writes and reads it: `1min 30s`, `500ms`, `20`. `None` within: for ever.
pub(super) fn time_span(text: &str) -> Option<Option<Duration>> {
    let text = text.trim();
    if text == "infinity" {
        return Some(None);
    }
    match text.parse() {
        Ok(seconds) => Some(Some(Duration::from_secs(seconds))),
        Err(_) => humantime::parse_duration(text).ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::exec_line::ExecLine;

    #[test]
    fn settings_are_those_of_the_service_and_an_empty_one_resets() {
        let mut unit = UnitFile::default();
        unit.parse(
            "[Unit]\nType=none\n[Service]\n# a comment\nType = notify\nExecStart=/srv/app \\\n; so\n  --port 80\n",
        );
        unit.parse("[Service]\nExecStart=\nExecStart=/srv/other\nType=simple\n[Install]\nType=x\n");
        assert_eq!((unit.one("Type"), unit.all("ExecStart")), (Some("simple"), &["/srv/other".to_owned()][..]));
        let mut joined = UnitFile::default();
        joined.parse("[Service]\nExecStart=/srv/app \\\n; so\n  --port 80\n");
        assert_eq!(joined.one("ExecStart"), Some("/srv/app  --port 80"));
    }

    #[test]
    fn drop_ins_beside_a_file_count() {
        let directory = std::env::temp_dir().join(format!("handover-unit-{}", std::process::id()));
        fs::create_dir_all(directory.join("app.service.d")).unwrap();
        let unit = directory.join("app.service");
        fs::write(&unit, "[Service]\nType=simple\nKillMode=none\n").unwrap();
        fs::write(directory.join("app.service.d/2.conf"), "[Service]\nType=notify\n").unwrap();
        fs::write(directory.join("app.service.d/1.conf"), "[Service]\nType=forking\n").unwrap();
        fs::write(directory.join("app.service.d/3.off"), "[Service]\nType=oneshot\n").unwrap();
        let read = UnitFile::read(unit.to_str().unwrap()).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!((read.one("Type"), read.one("KillMode")), (Some("notify"), Some("none")));
        assert!(UnitFile::read("no-such-unit-at-all").is_err());
    }

    #[test]
    fn time_spans_read_as_systemd_reads_them() {
        let seconds = |number| Some(Some(Duration::from_secs(number)));
        assert_eq!((time_span("1min 30s"), time_span("20"), time_span("0")), (seconds(90), seconds(20), seconds(0)));
        assert_eq!((time_span("infinity"), time_span("soon")), (Some(None), None));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read(text in "(\\[Service\\]|ExecStart|[=\\\\;# \n@{}a-z/%$\"'-]){0,80}") {
            let mut unit = UnitFile::default();
            unit.parse(&text);
            let _ = time_span(&text);
            let lines = unit.all("ExecStart").iter().map(String::as_str).chain([text.as_str()]);
            lines.for_each(|line| {
                let _ = (ExecLine::of_file(line), ExecLine::of_property(line));
            });
        }
    }
}
