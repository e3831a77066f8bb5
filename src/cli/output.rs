//! What is printed: stages for people on a terminal, plain lines in a log, one JSON object a line with `--json`.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use handover::control::{Answer, Outcome, ResultEvent, StageEvent, StageName};
use serde::Serialize;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::journal::error_prefix;

/// Of what the new build wrote, so that the reason above it stays in sight; `--json` has all that was kept.
const STDERR_BYTES_MAX: usize = 3000;

pub(crate) struct Output {
    json: bool,
    terminal: bool,
    /// On a terminal the count of a drain, and why a build still starts, are written over themselves.
    open_line: bool,
    /// Connections are being finished.
    drains: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json, terminal: !json && io::stdout().is_terminal(), open_line: false, drains: false }
    }

    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    pub(super) fn line(&mut self, text: &str) {
        self.lines(&printable(text));
    }

    /// Whoever reads may have gone (`| head`); what is being done goes on all the same.
    fn lines(&mut self, text: &str) {
        let start = if std::mem::take(&mut self.open_line) { "\r\x1b[K" } else { "" };
        let _ = writeln!(io::stdout().lock(), "{start}{text}");
    }

    /// A line that may be long, broken at the edge of a terminal.
    pub(super) fn long_line(&mut self, text: &str, indent: usize) {
        let width = width(&io::stdout());
        self.lines(&wrapped(&printable(text), width, indent));
    }

    fn over_line(&mut self, text: &str) {
        let mut stdout = io::stdout().lock();
        // One that goes on in the next line could not be written over.
        let text = shortened(&printable(text), width(&stdout).map_or(usize::MAX, |width| width.saturating_sub(1)));
        let _ = write!(stdout, "\r\x1b[K{text}");
        let _ = stdout.flush();
        self.open_line = true;
    }

    pub(super) fn json_line(&mut self, value: &impl Serialize) {
        if let Ok(text) = serde_json::to_string(value) {
            self.lines(&text);
        }
    }

    pub(super) fn answer(&mut self, verb: &str, answer: &Answer) {
        match answer {
            Answer::Accepted(accepted) if self.json => {
                self.json_line(&json!({"event": "accepted", "pid": accepted.pid, "generation": accepted.generation}));
            }
            Answer::Accepted(accepted) => {
                self.line(&format!("{verb} process {} (generation {})", accepted.pid, accepted.generation));
            }
            Answer::Stage(stage) if self.json => {
                #[derive(Serialize)]
                struct Line<'a> {
                    event: &'static str,
                    #[serde(flatten)]
                    stage: &'a StageEvent,
                }
                self.json_line(&Line { event: "stage", stage });
            }
            Answer::Stage(stage) => self.stage(stage),
            _ => {}
        }
    }

    fn stage(&mut self, stage: &StageEvent) {
        let text = stage_line(&stage.stage.to_string(), stage.at_ms, &details(stage));
        let drains = stage.stage == StageName::Draining;
        self.drains |= drains;
        let changes = stage.stage == StageName::Starting || drains && stage.connections != Some(0);
        match changes && self.terminal {
            true => self.over_line(&text),
            false => self.line(&text),
        }
    }

    /// The last word; what went wrong goes to stderr.
    pub(super) fn result(&mut self, result: &ResultEvent) -> Exit {
        let exit = Exit::from(result.result);
        if self.json {
            #[derive(Serialize)]
            struct Line<'a> {
                event: &'static str,
                #[serde(flatten)]
                result: &'a ResultEvent,
                exit_code: u8,
            }
            self.json_line(&Line { event: "result", result, exit_code: exit as u8 });
            return exit;
        }
        if exit == Exit::Done {
            // A restart has told its own.
            if let Some(at) = result.at_ms.filter(|_| self.drains && result.result != Outcome::Restarted) {
                self.line(&stage_line("drained", at, ""));
            }
            self.line(&result.message);
            return exit;
        }
        let mut lines = vec![format!("handover: {}", result.message)];
        lines.extend(result.mend.iter().map(|mend| format!("what to do: {mend}")));
        let last = last_lines(&result.stderr);
        if !last.is_empty() {
            lines.push("the last lines that the new build wrote to stderr:".to_owned());
        }
        lines.extend(last.iter().map(|line| format!("  | {line}")));
        self.complain(&lines);
        exit
    }

    fn complain(&mut self, lines: &[String]) {
        self.end_line();
        let (mut stderr, prefix) = (io::stderr().lock(), error_prefix());
        let width = width(&stderr);
        for line in lines {
            let _ = writeln!(stderr, "{prefix}{}", wrapped(&printable(line), width, 2));
        }
    }

    fn end_line(&mut self) {
        if std::mem::take(&mut self.open_line) {
            let _ = writeln!(io::stdout().lock());
        }
    }

    pub(super) fn failure(mut self, failure: &Failure) {
        if self.json {
            let exit_code = failure.exit as u8;
            self.json_line(&json!({"event": "error", "message": failure.message, "exit_code": exit_code}));
        } else {
            self.complain(&[format!("handover: {}", failure.message)]);
        }
    }
}

/// Stages and results, as they are shown for people.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let shown = |text: &str| assert_eq!(wrapped(&shortened(text, 200), Some(80), 2).is_empty(), text.is_empty());
    if let Ok(stage) = serde_json::from_slice::<StageEvent>(bytes) {
        shown(&stage_line(&stage.stage.to_string(), stage.at_ms, &details(&stage)));
    }
    if let Ok(result) = serde_json::from_slice::<ResultEvent>(bytes) {
        shown(&result.message);
        assert!(last_lines(&result.stderr).iter().map(String::len).sum::<usize>() <= STDERR_BYTES_MAX);
    }
}

fn stage_line(name: &str, at_ms: f64, details: &str) -> String {
    format!("  {name:<10}{:>10}{details}", time(at_ms)).trim_end().to_owned()
}

/// The last of `lines` that fit, each of them whole.
fn last_lines(lines: &[String]) -> &[String] {
    let mut room = STDERR_BYTES_MAX;
    let fits = |line: &&String| room.checked_sub(line.len()).inspect(|left| room = *left).is_some();
    let count = lines.iter().rev().take_while(fits).count();
    &lines[lines.len() - count..]
}

/// What processes say of themselves, and of others: none of it is to move the cursor, or to look like a line of ours.
fn printable(text: &str) -> String {
    text.chars().map(|one| if one.is_control() && one != '\t' { '\u{fffd}' } else { one }).collect()
}

/// With a mark where something was cut off.
fn shortened(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some(_) => text.chars().take(chars.saturating_sub(1)).chain(['…']).collect(),
        None => text.to_owned(),
    }
}

/// Of the terminal that this is; whoever reads from elsewhere gets whole lines.
pub(super) fn width(stream: &impl AsFd) -> Option<usize> {
    terminal_size::terminal_size_of(stream).map(|(width, _)| usize::from(width.0))
}

/// Broken between words, so that a terminal does not break within them. What goes on is indented.
pub(super) fn wrapped(text: &str, width: Option<usize>, indent: usize) -> String {
    const WIDTH_MIN: usize = 40;
    let Some(width) = width.filter(|width| *width >= WIDTH_MIN) else { return text.to_owned() };
    let mut done = String::new();
    let mut used = 0;
    for word in text.split_inclusive(' ') {
        let length = word.trim_end().chars().count();
        if used + length > width && used > indent {
            done.truncate(done.trim_end().len());
            done.push('\n');
            done.push_str(&" ".repeat(indent));
            used = indent;
        }
        done.push_str(word);
        used += word.chars().count();
    }
    done
}

fn details(stage: &StageEvent) -> String {
    let mut parts = Vec::new();
    parts.extend(stage.pid.map(|pid| format!("pid {pid}")));
    parts.extend(stage.reason.clone());
    let connections = |count: usize, what: &str| match count {
        1 => format!("1 connection {what}"),
        _ => format!("{count} connections {what}"),
    };
    parts.extend(stage.connections.map(|count| connections(count, "open")));
    parts.extend(stage.cut.filter(|cut| *cut > 0).map(|cut| connections(cut, "closed")));
    if let Some(claims) = &stage.claims {
        let named = [("keeps", &claims.kept), ("adds", &claims.added), ("does not want", &claims.unclaimed)];
        parts.extend(
            named.iter().filter(|(_, names)| !names.is_empty()).map(|(verb, names)| format!("{verb} {}", some(names))),
        );
    }
    if parts.is_empty() { String::new() } else { format!("   {}", parts.join("; ")) }
}

/// There may be thousands.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    match names.get(..SHOWN) {
        Some(first) if names.len() > SHOWN => format!("{} and {} more", first.join(", "), names.len() - SHOWN),
        _ => names.join(", "),
    }
}

/// Milliseconds below a second, seconds above.
fn time(milliseconds: f64) -> String {
    if milliseconds < 1000.0 { format!("{milliseconds:.1} ms") } else { format!("{:.2} s", milliseconds / 1000.0) }
}

/// How long something has lasted, in two units at the most.
pub(super) fn lasted(time: Duration) -> String {
    let text = humantime::format_duration(Duration::from_secs(time.as_secs())).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Columns as wide as their widest cell; the last one is not padded.
pub(super) fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cells = |column: usize| rows.iter().filter_map(move |row| row.get(column));
    let widths: Vec<usize> =
        (0..columns).map(|column| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["A".to_owned(), "LONGER".to_owned()], vec!["long".to_owned(), "b".to_owned()]];
        assert_eq!(table(&rows), ["A     LONGER", "long  b"]);
    }

    #[test]
    fn long_lines_break_between_words() {
        let text = "handover: one two three four five six seven eight nine";
        assert_eq!(wrapped(text, Some(40), 2), "handover: one two three four five six\n  seven eight nine");
        assert_eq!(wrapped(text, None, 2), text);
        let path = format!("at `{}`: no", "x".repeat(60));
        assert_eq!(wrapped(&path, Some(40), 2), format!("at\n  `{}`:\n  no", "x".repeat(60)));
        assert_eq!(wrapped("", Some(40), 2), "");
    }

    #[test]
    fn what_is_cut_off_is_marked() {
        assert_eq!((shortened("äbc", 3), shortened("äbcd", 3)), ("äbc".to_owned(), "äb…".to_owned()));
        assert_eq!(shortened("abc", usize::MAX), "abc");
    }

    #[test]
    fn as_many_of_the_last_lines_as_fit_are_shown_whole() {
        let lines = ["x".repeat(STDERR_BYTES_MAX), "the reason".to_owned(), "x".repeat(1000)];
        assert_eq!(last_lines(&lines), &lines[1..]);
        assert_eq!(last_lines(&lines[1..]), &lines[1..]);
        assert_eq!(last_lines(&[]), &[] as &[String]);
    }

    #[test]
    fn times_read_well() {
        assert_eq!((time(0.61), time(1004.2)), ("0.6 ms".to_owned(), "1.00 s".to_owned()));
        assert_eq!(lasted(Duration::from_millis(93_784_500)), "1day 2h");
    }

    #[test]
    fn many_names_are_cut_short() {
        let names: Vec<String> = (0..8).map(|number| number.to_string()).collect();
        assert_eq!(some(&names), "0, 1, 2, 3, 4 and 3 more");
        assert_eq!(some(&names[..2]), "0, 1");
    }
}
