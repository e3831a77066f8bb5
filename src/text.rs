//! What others say, where it is shown or logged.

/// On one line, and with nothing in it that could move the cursor of whoever reads it or pretend to be another line.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|one| if one.is_control() && one != '\t' { '\u{fffd}' } else { one }).collect()
}
