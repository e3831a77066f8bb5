//! What needs root, or a program, is left out elsewhere, and said so; in CI nothing may be left out.

/// Whether this test can be run.
#[must_use]
pub(crate) fn is_root_or_skip(what: &str) -> bool {
    has_or_skip(nix::unistd::geteuid().is_root(), "root", what)
}

/// The same for a test with a program that not every machine has.
#[must_use]
pub(crate) fn is_installed_or_skip(program: &str, what: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    has_or_skip(std::env::split_paths(&path).any(|directory| directory.join(program).exists()), program, what)
}

fn has_or_skip(has: bool, need: &str, what: &str) -> bool {
    if !has {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "{what}: needs {need}, and CI leaves nothing out"
        );
        eprintln!("left out, because it needs {need}: {what}");
    }
    has
}
