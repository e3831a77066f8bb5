//! The targets of the command; those of the library, and what they are for, are in `src/fuzz.rs`.

#[cfg(test)]
#[path = "../fuzz/replay.rs"]
mod replay;

/// A target: its name, and what is called.
type Target = (&'static str, fn(&[u8]));

/// By their names.
pub(crate) const TARGETS: &[Target] = &[
    ("exec-lines", super::check::fuzz::exec_lines),
    ("options-files", super::options_file::fuzz),
    ("process-files", super::check::fuzz::process_files),
    ("programs", super::check::fuzz::programs),
    ("statuses", super::status::fuzz),
    ("systemctl", super::check::fuzz::systemctl),
    ("unit-files", super::check::fuzz::unit_files),
];

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_found_does_no_harm_any_more() {
        super::replay::replay(super::TARGETS);
    }
}
