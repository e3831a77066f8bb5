//! `handover exec --config FILE`: the options in TOML, as if they stood on the command line before those that do. So they
//! are checked, explained and documented in one place.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command, Error};
use toml::{Table, Value};

const VERB: &str = "exec";
const OPTION: &str = "--config";
/// The one key that is no option: what stands behind `--`.
const PROGRAM: &str = "program";

const FILE_BYTES_MAX: u64 = 1 << 20;

/// The command line with what the file that it names adds.
pub(super) fn expand(arguments: Vec<OsString>, definitions: &Command) -> Result<Vec<OsString>, Error> {
    let (Some(verb), Some(file)) = (arguments.get(1).filter(|verb| *verb == VERB), named_file(&arguments)) else {
        return Ok(arguments);
    };
    let exec = definitions.find_subcommand(verb);
    let refuse = |cause: String| Error::raw(ErrorKind::ValueValidation, format!("{}: {cause}\n", file.display()));
    let text = read(&file).map_err(|error| refuse(format!("cannot read it: {error}")))?;
    let mut table: Table = text.parse().map_err(|error| refuse(format!("{error}")))?;
    let program = table.remove(PROGRAM).map(|value| program(&value)).transpose().map_err(refuse)?;
    let mut expanded: Vec<OsString> = arguments.iter().take(2).cloned().collect();
    for (key, value) in &table {
        expanded.extend(exec.map_or(Ok(vec![]), |exec| options(exec, key, value)).map_err(refuse)?);
    }
    let names_program = arguments.iter().any(|argument| argument == "--");
    expanded.extend(arguments.into_iter().skip(2));
    if let (Some(program), false) = (program, names_program) {
        expanded.push("--".into());
        expanded.extend(program.into_iter().map(OsString::from));
    }
    Ok(expanded)
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(file)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    match text.len() as u64 {
        0..=FILE_BYTES_MAX => Ok(text),
        _ => Err(io::Error::other(format!("it has more than {FILE_BYTES_MAX} bytes"))),
    }
}

/// The last one, as of every other option.
fn named_file(arguments: &[OsString]) -> Option<std::path::PathBuf> {
    let mut own = arguments.iter().take_while(|argument| *argument != "--");
    let mut named = None;
    while let Some(argument) = own.next() {
        let text = argument.to_string_lossy();
        if argument == OPTION {
            named = own.next().map(Into::into);
        } else if let Some(file) = text.strip_prefix(OPTION).and_then(|rest| rest.strip_prefix('=')) {
            named = Some(Path::new(file).to_path_buf());
        }
    }
    named
}

fn program(value: &Value) -> Result<Vec<String>, String> {
    let words = value.as_array().map(|words| words.iter().map(|word| word.as_str().map(str::to_owned)).collect());
    let words: Option<Vec<String>> = words.unwrap_or_default();
    words.filter(|words| !words.is_empty()).ok_or_else(|| {
        format!("`{PROGRAM}` is a list of strings, the program and its arguments, as in [\"node\", \"server.js\"]")
    })
}

/// One key as options of the command line.
fn options(exec: &Command, key: &str, value: &Value) -> Result<Vec<OsString>, String> {
    let is_it = |arg: &&Arg| arg.get_long() == Some(key) && format!("--{key}") != OPTION;
    let arg = exec.get_arguments().find(is_it).ok_or_else(|| unknown(exec, key))?;
    let one = |value: &Value| match value {
        Value::String(text) => Ok(OsString::from(format!("--{key}={text}"))),
        Value::Integer(number) => Ok(OsString::from(format!("--{key}={number}"))),
        _ => Err(format!("`{key}` is a string or a number")),
    };
    match (arg.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(true)) => Ok(vec![format!("--{key}").into()]),
        (ArgAction::SetTrue, Value::Boolean(false)) => Ok(vec![]),
        (ArgAction::SetTrue, _) => Err(format!("`{key}` is true or false")),
        (ArgAction::Append, Value::Array(values)) => values.iter().map(one).collect(),
        (_, value) => one(value).map(|option| vec![option]),
    }
}

/// Options that there are, each with its value, then those of the command line, then the program.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::sync::LazyLock;
    static DEFINITIONS: LazyLock<Command> = LazyLock::new(<super::Arguments as clap::CommandFactory>::command);
    let memfd = nix::sys::memfd::memfd_create("options", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let Ok(mut file) = memfd.map(File::from) else { return };
    let _ = file.write_all(bytes);
    let config = format!("--config=/proc/self/fd/{}", file.as_raw_fd());
    let Ok(expanded) = expand(["handover", VERB, &config].map(OsString::from).to_vec(), &DEFINITIONS) else { return };
    let config = OsString::from(config);
    let own: Vec<String> = expanded
        .iter()
        .skip(2)
        .take_while(|one| **one != config)
        .map(|one| one.to_string_lossy().into_owned())
        .collect();
    let is_option = |text: &String| {
        let name = text.strip_prefix("--").and_then(|rest| rest.split('=').next());
        let exec = DEFINITIONS.find_subcommand(VERB);
        exec.is_some_and(|exec| exec.get_arguments().any(|arg| name.is_some() && arg.get_long() == name))
    };
    assert!(own.iter().all(is_option), "{own:?}");
    // Names of hosts would be looked up.
    let asks_nobody = expanded.iter().filter(|one| !one.to_string_lossy().starts_with("--listen"));
    let _ = DEFINITIONS.clone().try_get_matches_from(asks_nobody);
}

/// Clap knows what is near.
fn unknown(exec: &Command, key: &str) -> String {
    let error = exec.clone().try_get_matches_from([VERB.to_owned(), format!("--{key}")]).err();
    let near = error.and_then(|error| match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(near)) => Some(near.trim_start_matches('-').to_owned()),
        _ => None,
    });
    let near = near.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
    format!("there is no option `{key}`{near}")
}
