//! `oracle`: puts load on a server, counts how every request ends, and says whether one was lost.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use oracle::{Load, Running, Stopper, Target};

#[path = "mod.rs"]
mod oracle;

const USAGE: &str = "\
Usage: oracle --target ADDRESS:PORT|PATH [load] [options]

Load (at least one; N is the number of clients, each kind adds its own):
  --new N              a new connection for every request to /
  --kept N             requests to / on connections that are kept
  --slow N:SECONDS     requests to /slow/SECONDS
  --stream N           reads /stream
  --websocket N        messages on /ws
  --echo N             lines to an echo server, a new connection each
  --echo-kept N        lines on connections that are kept

Options:
  --target T           may be given again: the clients are dealt out
  --rate R             so many new connections a second, answered or not
  --think TIME         between two requests on a kept connection
  --interval TIME      between two messages on a WebSocket [100ms]
  --post BYTES         POST a body of this size instead of GET, to / and /slow
  --stream-lines N     how many lines /stream sends [20]
  --patience TIME      how long a request may take [30s]
  --monotonic          a generation may not answer after a higher one has
  --duration TIME      ends after this time [on SIGTERM or SIGINT]
  --requests N         ends after so many requests
  --until-eof          ends when its standard input does
  --live               a line a second on standard error
  --json               the report as JSON

TIME is a number with ms, s or m; without one it means seconds.
Exit status: 0 nothing was lost, 1 something was or nothing was answered, 2 usage.
";

fn main() -> ExitCode {
    let plan = match Plan::parse(std::env::args().skip(1)) {
        Ok(Some(plan)) => plan,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("oracle: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(plan) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("oracle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(plan: Plan) -> io::Result<ExitCode> {
    let mut signals = signals()?;
    let running = plan.load.start();
    let stopper = running.stopper();
    thread::spawn(move || stop_at_end(&mut signals, &stopper));
    if plan.until_eof {
        let stopper = running.stopper();
        thread::spawn(move || stop_at_end(&mut io::stdin(), &stopper));
    }
    watch(&running, plan.live);
    let tally = running.stop();
    let report = if plan.json { format!("{:#}\n", tally.to_json()) } else { tally.to_string() };
    io::stdout().write_all(report.as_bytes())?;
    Ok(if tally.lossless() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn watch(running: &Running, live: bool) {
    while !running.wait_for_end(Duration::from_secs(1)) {
        if live {
            eprintln!("{}", running.tally().line());
        }
    }
}

/// A stream that gets a byte with each signal that ends the load.
fn signals() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, writer.try_clone()?)?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, writer)?;
    Ok(reader)
}

/// Stops the load with the first byte of the signals, or the end of standard input.
fn stop_at_end(source: &mut impl Read, stopper: &Stopper) {
    let mut byte = [0];
    let _ = source.read(&mut byte);
    stopper.stop();
}

struct Plan {
    load: Load,
    until_eof: bool,
    live: bool,
    json: bool,
}

impl Plan {
    /// None if help was asked for.
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut targets: Vec<Target> = vec![];
        let mut changes: Vec<Box<dyn FnOnce(Load) -> Load>> = vec![];
        let (mut until_eof, mut live, mut json, mut loaded) = (false, false, false, false);
        let mut arguments = Arguments(arguments);
        while let Some(name) = arguments.0.next() {
            let change: Box<dyn FnOnce(Load) -> Load> = match name.as_str() {
                "-h" | "--help" => return Ok(None),
                "--target" => {
                    targets.push(arguments.value(&name)?.parse()?);
                    continue;
                }
                "--until-eof" => {
                    until_eof = true;
                    continue;
                }
                "--live" => {
                    live = true;
                    continue;
                }
                "--json" => {
                    json = true;
                    continue;
                }
                "--monotonic" => Box::new(Load::monotonic),
                "--rate" => {
                    let rate: f64 = arguments.number(&name)?;
                    if !rate.is_finite() || rate <= 0.0 {
                        return Err(format!("{name} {rate} is no rate"));
                    }
                    Box::new(move |load| load.rate(rate))
                }
                "--think" => arguments.time(&name).map(|time| Box::new(move |load: Load| load.think(time)))?,
                "--interval" => arguments.time(&name).map(|time| Box::new(move |load: Load| load.interval(time)))?,
                "--patience" => arguments.time(&name).map(|time| Box::new(move |load: Load| load.patience(time)))?,
                "--duration" => arguments.time(&name).map(|time| Box::new(move |load: Load| load.duration(time)))?,
                "--post" => {
                    let size: usize = arguments.number(&name)?;
                    Box::new(move |load| load.post(vec![b'x'; size]))
                }
                "--stream-lines" => {
                    let lines = arguments.number(&name)?;
                    Box::new(move |load| load.stream_lines(lines))
                }
                "--requests" => {
                    let requests = arguments.number(&name)?;
                    Box::new(move |load| load.requests(requests))
                }
                _ => {
                    loaded = true;
                    arguments.clients(&name)?
                }
            };
            changes.push(change);
        }
        let mut targets = targets.into_iter();
        let first = targets.next().ok_or("--target is missing")?;
        if !loaded {
            return Err("no load was asked for, such as --new 16".to_owned());
        }
        let load = targets.fold(Load::new(first), Load::also);
        let load = changes.into_iter().fold(load, |load, change| change(load));
        Ok(Some(Self { load, until_eof, live, json }))
    }
}

struct Arguments<I>(I);

impl<I: Iterator<Item = String>> Arguments<I> {
    fn value(&mut self, name: &str) -> Result<String, String> {
        self.0.next().ok_or_else(|| format!("{name} wants a value"))
    }

    fn number<T: std::str::FromStr>(&mut self, name: &str) -> Result<T, String> {
        let value = self.value(name)?;
        value.parse().map_err(|_| format!("{name} wants a number, not `{value}`"))
    }

    fn time(&mut self, name: &str) -> Result<Duration, String> {
        let value = self.value(name)?;
        time(&value).ok_or_else(|| format!("{name} wants a time such as 500ms or 10s, not `{value}`"))
    }

    fn clients(&mut self, name: &str) -> Result<Box<dyn FnOnce(Load) -> Load>, String> {
        if name == "--slow" {
            let value = self.value(name)?;
            let parts = value.split_once(':').and_then(|(clients, seconds)| {
                let seconds: f64 = seconds.parse().ok()?;
                Some((clients.parse().ok()?, seconds)).filter(|_| seconds.is_finite() && seconds >= 0.0)
            });
            let (clients, seconds) = parts.ok_or_else(|| format!("--slow wants N:SECONDS, not `{value}`"))?;
            return Ok(Box::new(move |load| load.slow(clients, seconds)));
        }
        let add = match name {
            "--new" => Load::new_connections,
            "--kept" => Load::kept,
            "--stream" => Load::stream,
            "--websocket" => Load::websocket,
            "--echo" => Load::echo,
            "--echo-kept" => Load::echo_kept,
            _ => return Err(format!("unknown argument `{name}`")),
        };
        let clients = self.number(name)?;
        Ok(Box::new(move |load| add(load, clients)))
    }
}

fn time(text: &str) -> Option<Duration> {
    let (number, factor) = if let Some(number) = text.strip_suffix("ms") {
        (number, 0.001)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1.0)
    } else if let Some(number) = text.strip_suffix('m') {
        (number, 60.0)
    } else {
        (text, 1.0)
    };
    let number: f64 = number.parse().ok()?;
    Duration::try_from_secs_f64(number * factor).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Plan>, String> {
        Plan::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_are_checked() {
        let all = "--target 127.0.0.1:1 --target [::1]:1 --new 1 --kept 2 --slow 1:0.5 --stream 1 --websocket 1 \
                   --echo 1 --echo-kept 1 --rate 10.5 --think 5ms --interval 1s --post 10 --stream-lines 3 \
                   --patience 1m --monotonic --duration 0.1 --requests 5 --until-eof --live --json";
        let plan = parse(all).unwrap().unwrap();
        assert!(plan.until_eof && plan.live && plan.json);
        assert!(parse("--help").unwrap().is_none());
        for bad in [
            "",
            "--new 1",
            "--target 127.0.0.1:1",
            "--target nowhere --new 1",
            "--target /x --new",
            "--target /x --new x",
            "--target /x --new -1",
            "--target /x --slow 1",
            "--target /x --slow 1:inf",
            "--target /x --new 1 --rate 0",
            "--target /x --new 1 --rate nan",
            "--target /x --new 1 --duration 1h",
            "--target /x --new 1 --duration -1",
            "--target /x --new 1 --bogus",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
