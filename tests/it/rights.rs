//! What needs root is left out elsewhere, and said so; in CI nothing may be left out.

/// Whether this test can be run.
#[must_use]
pub(crate) fn is_root_or_skip(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{what}: needs root, and CI leaves nothing out");
        eprintln!("left out, because it needs root: {what}");
    }
    root
}
