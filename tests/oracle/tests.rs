//! The oracle against servers that misbehave in one way each.

mod websocket;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::connection::Connection;
use super::wire::Look;
use super::*;

const LONG: Duration = Duration::from_secs(60);
const BRIEF: Duration = Duration::from_millis(1);

/// Serves each connection with `handler` in its own thread, for as long as the tests run.
fn server(handler: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    server_at("127.0.0.1:0", handler)
}

fn server_at(address: &str, handler: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let handler = handler.clone();
            thread::spawn(move || handler(stream));
        }
    });
    address
}

struct Request {
    path: String,
    closes: bool,
}

/// Reads one request; none at the end of the connection.
fn request(stream: &mut impl Read) -> Option<Request> {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).ok()?;
    assert_eq!(head.starts_with("POST"), length.is_some());
    let closes = head.contains("Connection: close");
    Some(Request { path: head.split(' ').nth(1).unwrap().to_owned(), closes })
}

fn response(body: &str, field: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{field}Content-Length: {}\r\n\r\n{body}", body.len())
}

fn good(mut stream: impl Read + Write) {
    while let Some(Request { path, closes }) = request(&mut stream) {
        if let Some(seconds) = path.strip_prefix("/slow/") {
            thread::sleep(Duration::from_secs_f64(seconds.parse().unwrap()));
        }
        let field = if closes { "Connection: close\r\n" } else { "" };
        let answer = if path == "/stream" { stream_answer(20, true) } else { response("gen=1 pid=7", field) };
        if stream.write_all(answer.as_bytes()).is_err() || closes {
            return;
        }
    }
}

fn stream_answer(lines: u32, ended: bool) -> String {
    let mut answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
    for line in 1..=lines {
        let line = format!("line {line} of 20\n");
        answer.push_str(&format!("{:x}\r\n{line}\r\n", line.len()));
    }
    answer + if ended { "0\r\n\r\n" } else { "" }
}

/// Answers one request with `answer` and closes at once, so that both arrive in one segment.
fn once(answer: String) -> SocketAddr {
    server(move |mut stream| {
        SockRef::from(&stream).set_tcp_cork(true).unwrap();
        if request(&mut stream).is_some() {
            let _ = stream.write_all(answer.as_bytes());
        }
    })
}

fn finish(load: Load) -> Tally {
    let running = load.start();
    assert!(running.wait_for_end(LONG), "{}", running.tally());
    running.stop()
}

/// Expects every one of `requests` to have ended as `outcome`.
fn all(tally: &Tally, requests: u64, outcome: Outcome) {
    assert_eq!((tally.requests(), tally.count(outcome)), (requests, requests), "{tally}");
    assert_eq!(tally.lossless(), outcome == Outcome::Ok, "{tally}");
    assert_eq!(tally.failed() > 0, outcome.is_failure(), "{tally}");
}

#[test]
fn a_good_server_loses_nothing() {
    let address = server(good);
    let load = Load::new(address).new_connections(4).kept(4).slow(2, 0.01).stream(2).monotonic();
    let running = load.start();
    running
        .wait_for(
            |tally| {
                let of = |kind| tally.count_of(kind, Outcome::Ok);
                of(Kind::New) >= 50 && of(Kind::Kept) >= 50 && of(Kind::Slow) >= 4 && of(Kind::Stream) >= 4
            },
            LONG,
        )
        .unwrap();
    running.wait_for_generation(1, LONG).unwrap();
    running.wait_for_more(20, LONG).unwrap();
    let tally = running.stop();
    tally.assert_lossless();
    assert_eq!(tally.requests(), tally.ok());
    assert_eq!(tally.generations().keys().copied().collect::<Vec<_>>(), [1]);
    assert_eq!(tally.pids().iter().copied().collect::<Vec<_>>(), [7]);
    assert!(tally.first_answer(1).unwrap() < tally.elapsed());
    assert!(tally.latency(Kind::Slow).unwrap().min() >= 10_000);
    assert_eq!(tally.closes(), Closes::default());
}

#[test]
fn a_body_can_be_posted() {
    let address = server(good);
    all(&finish(Load::new(address).kept(2).post("body").requests(50)), 50, Outcome::Ok);
}

#[test]
fn ipv6_and_unix_are_targets() {
    // Not every machine has an IPv6 loopback.
    if TcpListener::bind("[::1]:0").is_ok() {
        let address = server_at("[::1]:0", good);
        all(&finish(Load::new(address).new_connections(2).requests(20)), 20, Outcome::Ok);
    }
    let path = std::env::temp_dir().join(format!("oracle-{}-good.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || good(stream));
        }
    });
    let tally = finish(Load::new(path.as_path()).kept(4).requests(100));
    std::fs::remove_file(&path).unwrap();
    all(&tally, 100, Outcome::Ok);
}

#[test]
fn several_targets_share_the_clients() {
    let load = Load::new(server(good)).also(once(response("gen=2 pid=8", "Connection: close\r\n")));
    let running = load.new_connections(2).start();
    running.wait_for(|tally| tally.generations().len() == 2, LONG).unwrap();
    running.stop().assert_lossless();
}

#[test]
fn a_close_instead_of_an_answer_is_cut() {
    let address = once(String::new());
    all(&finish(Load::new(address).new_connections(2).requests(10)), 10, Outcome::Cut);
    let tally = finish(Load::new(address).kept(2).requests(30));
    all(&tally, 30, Outcome::Cut);
    assert_eq!(tally.failures().len(), 20);
    let failure = &tally.failures()[0];
    assert!(failure.sent.starts_with("`GET / HTTP/1.1\\r\\n"), "{failure}");
    assert!(failure.came.contains("no byte of an answer"), "{failure}");
    assert!(failure.target == address.to_string() && failure.kind == Kind::Kept, "{failure}");
}

#[test]
fn a_kept_connection_that_is_closed_after_the_request_is_cut() {
    let address = server(|mut stream| {
        request(&mut stream);
        let _ = stream.write_all(response("gen=1 pid=7", "").as_bytes());
        request(&mut stream);
    });
    let tally = finish(Load::new(address).kept(1).requests(10));
    assert_eq!((tally.ok(), tally.count(Outcome::Cut), tally.failed()), (5, 5, 5), "{tally}");
    assert_eq!(tally.closes(), Closes::default());
}

#[test]
fn a_kept_connection_that_is_reset_after_the_request_is_cut() {
    let address = server(|mut stream| {
        request(&mut stream);
        let _ = stream.write_all(response("gen=1 pid=7", "").as_bytes());
        let _ = stream.read_exact(&mut [0]);
    });
    let tally = finish(Load::new(address).kept(1).requests(10));
    assert_eq!((tally.ok(), tally.count(Outcome::Cut), tally.failed()), (5, 5, 5), "{tally}");
    // But with half an answer before it, it is a reset.
    let address = server(|mut stream| {
        let _ = stream.read_exact(&mut [0]);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
    });
    all(&finish(Load::new(address).kept(1).requests(10)), 10, Outcome::Reset);
}

#[test]
fn a_reset_is_counted() {
    // Closing while the rest of the request is unread resets the connection.
    let address = server(|mut stream| {
        let _ = stream.read_exact(&mut [0]);
    });
    all(&finish(Load::new(address).new_connections(2).requests(10)), 10, Outcome::Reset);
    all(&finish(Load::new(address).kept(2).requests(10)), 10, Outcome::Reset);
}

#[test]
fn a_refusal_is_counted() {
    // Bound but not listening: nobody else can take the port.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    all(&finish(Load::new(address).new_connections(2).requests(10)), 10, Outcome::Refused);
    all(&finish(Load::new(address).kept(2).requests(10)), 10, Outcome::Refused);
    let nowhere = std::env::temp_dir().join("oracle-no-such.sock");
    all(&finish(Load::new(nowhere).new_connections(2).websocket(1).requests(10)), 10, Outcome::Refused);
}

#[test]
fn a_full_unix_queue_is_waited_for() {
    let path = std::env::temp_dir().join(format!("oracle-{}-full.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(1).unwrap();
    let load = Load::new(path.as_path()).new_connections(8).patience(Duration::from_millis(100)).requests(8);
    let tally = finish(load);
    std::fs::remove_file(&path).unwrap();
    all(&tally, 8, Outcome::TimedOut);
}

#[test]
fn an_answer_of_the_wrong_shape_is_wrong() {
    for answer in [
        response("hello", "Connection: close\r\n"),
        response("gen=1 pid=7", "").replace("200 OK", "500 Oops"),
        response("gen=1 pid=7", "") + "more",
        response("gen=1 pid=7", "Connection: close\r\n") + "more",
        "nonsense\r\n\r\n".to_owned(),
    ] {
        let address = once(answer);
        all(&finish(Load::new(address).new_connections(1).requests(3)), 3, Outcome::Wrong);
        all(&finish(Load::new(address).kept(1).requests(3)), 3, Outcome::Wrong);
    }
}

/// Waits until nothing lies in the receive queue of the other end, which the kernel tells in hexadecimal.
fn until_it_is_read(stream: &TcpStream) {
    let name = |address: SocketAddr| match address {
        SocketAddr::V4(four) => format!("{:08X}:{:04X}", u32::from_ne_bytes(four.ip().octets()), four.port()),
        SocketAddr::V6(_) => panic!("{address} is not of version 4"),
    };
    let ends = format!(" {} {} ", name(stream.peer_addr().unwrap()), name(stream.local_addr().unwrap()));
    let is_read = || {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        // The kernel passes over lines of a table that changes meanwhile.
        let Some(line) = table.lines().find(|line| line.contains(&ends)) else { return false };
        // Number, both ends, state; then what is to be sent and what is to be read.
        line.split_whitespace().nth(4).unwrap().ends_with(":00000000")
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_read() {
        assert!(Instant::now() < deadline, "the client does not read");
        thread::yield_now();
    }
}

#[test]
fn bytes_that_come_before_the_close_are_wrong() {
    let address = server(|mut stream| {
        request(&mut stream);
        let _ = stream.write_all(response("gen=1 pid=7", "Connection: close\r\n").as_bytes());
        until_it_is_read(&stream);
        let _ = stream.write_all(b"more");
    });
    let tally = finish(Load::new(address).new_connections(2).kept(2).requests(8));
    all(&tally, 8, Outcome::Wrong);
    assert!(tally.generations().is_empty(), "{tally}");
}

#[test]
fn a_truncated_body_is_cut() {
    let mut answer = response("gen=1 pid=7", "Connection: close\r\n");
    answer.pop();
    let tally = finish(Load::new(once(answer)).new_connections(1).kept(1).requests(10));
    all(&tally, 10, Outcome::Cut);
    assert!(tally.failures()[0].came.contains("gen=1 pid="), "{tally}");
}

#[test]
fn a_truncated_stream_is_cut_and_a_short_one_wrong() {
    all(&finish(Load::new(once(stream_answer(20, true))).stream(1).requests(3)), 3, Outcome::Ok);
    all(&finish(Load::new(once(stream_answer(20, false))).stream(1).requests(3)), 3, Outcome::Cut);
    all(&finish(Load::new(once(stream_answer(7, false))).stream(1).requests(3)), 3, Outcome::Cut);
    all(&finish(Load::new(once(stream_answer(19, true))).stream(1).requests(3)), 3, Outcome::Wrong);
    all(&finish(Load::new(once(stream_answer(20, true))).stream(1).stream_lines(3).requests(3)), 3, Outcome::Wrong);
}

#[test]
fn no_answer_in_time_is_timed_out() {
    let address = server(|stream| {
        let _ = (&stream).read(&mut [0; 4096]);
        // Until the client gives up.
        let _ = (&stream).read(&mut [0]);
    });
    let patience = Duration::from_millis(50);
    for load in [Load::new(address).new_connections(1), Load::new(address).kept(1), Load::new(address).websocket(1)] {
        let begin = Instant::now();
        all(&finish(load.patience(patience).requests(2)), 2, Outcome::TimedOut);
        assert!(begin.elapsed() >= 2 * patience);
    }
}

#[test]
fn an_announced_close_is_no_failure() {
    let address = once(response("gen=1 pid=7", "Connection: close\r\n"));
    let tally = finish(Load::new(address).kept(2).requests(50));
    all(&tally, 50, Outcome::Ok);
    assert_eq!(tally.closes(), Closes { announced: 50, ..Closes::default() });
    tally.assert_lossless();
}

#[test]
fn an_announced_close_that_does_not_come_is_noted() {
    let address = server(|mut stream| {
        request(&mut stream);
        let _ = stream.write_all(response("gen=1 pid=7", "Connection: close\r\n").as_bytes());
        let _ = stream.read(&mut [0]);
    });
    let tally = finish(Load::new(address).kept(1).requests(1));
    all(&tally, 1, Outcome::Ok);
    assert_eq!(tally.closes(), Closes { left_open: 1, ..Closes::default() });
}

#[test]
fn a_close_between_two_requests_is_no_failure() {
    // The end comes with the answer, so the client sees it before it sends again.
    let tally = finish(Load::new(once(response("gen=1 pid=7", ""))).kept(2).requests(50));
    all(&tally, 50, Outcome::Ok);
    // A client asks 50 times on 50 connections, and so finds the one before closed 49 times.
    assert_eq!(tally.closes(), Closes { idle: 48, ..Closes::default() });
}

#[test]
fn a_reset_between_two_requests_is_a_close() {
    let (closed, closes) = mpsc::channel();
    let address = server_once(move |mut stream| {
        // A byte of the request stays unread, which makes the close a reset.
        let _ = stream.read_exact(&mut [0; 3]);
        let _ = stream.write_all(response("gen=1 pid=7", "").as_bytes());
        drop(stream);
        closed.send(()).unwrap();
    });
    let deadline = Instant::now() + LONG;
    let mut connection = Connection::open(&address.into(), deadline).unwrap();
    connection.send(b"1234", deadline).unwrap();
    assert_eq!(http::response(&mut connection).unwrap().body, b"gen=1 pid=7");
    closes.recv_timeout(LONG).unwrap();
    assert_eq!(connection.look(), Look::Closed);
    // Had the client not looked, it would still know that no byte was sent.
    connection.send(b"1234", deadline).unwrap_err();
    assert!(connection.unsent());
}

fn server_once(handler: impl FnOnce(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || handler(listener.accept().unwrap().0));
    address
}

#[test]
fn what_was_not_asked_for_is_wrong() {
    let address = server(|mut stream| {
        request(&mut stream);
        let _ = stream.write_all(response("gen=1 pid=7", "").as_bytes());
        // The client thinks longer than this takes, and only then looks.
        let _ = stream.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n");
        let _ = stream.read(&mut [0]);
    });
    let tally = finish(Load::new(address).kept(1).think(Duration::from_millis(1)).requests(2));
    assert_eq!((tally.requests(), tally.count(Outcome::Wrong)), (2, tally.failed()), "{tally}");
    assert!(tally.failed() > 0, "{tally}");
}

#[test]
fn a_fresh_connection_that_is_closed_unasked_is_lost() {
    let address = server(drop);
    let tally = finish(Load::new(address).kept(2).new_connections(2).requests(20));
    assert_eq!(tally.count(Outcome::Cut) + tally.count(Outcome::Reset), 20, "{tally}");
}

fn echo(stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).is_ok_and(|count| count > 0) {
        if stream.get_mut().write_all(format!("gen=4 pid=9 {line}").as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

#[test]
fn lines_are_echoed() {
    let tally = finish(Load::new(server(echo)).echo(2).echo_kept(2).requests(200));
    all(&tally, 200, Outcome::Ok);
    assert_eq!(tally.generations().get(&4), Some(&200));
    assert_eq!(tally.closes(), Closes::default());
}

#[test]
fn echoes_must_be_whole_and_right() {
    let answering = |answer: &'static str| {
        server(move |stream| {
            SockRef::from(&stream).set_tcp_cork(true).unwrap();
            let mut stream = BufReader::new(stream);
            let _ = stream.read_line(&mut String::new());
            let _ = stream.get_mut().write_all(answer.as_bytes());
        })
    };
    let ask = |answer| finish(Load::new(answering(answer)).echo(1).echo_kept(1).requests(10));
    all(&ask(""), 10, Outcome::Cut);
    all(&ask("gen=1 pid=2 line 1 of"), 10, Outcome::Cut);
    all(&ask("gen=1 pid=2 something else\n"), 10, Outcome::Wrong);
    all(&ask("line 1 of client 0\n"), 10, Outcome::Wrong);
}

#[test]
fn an_open_loop_counts_from_when_a_request_was_due() {
    let stall = Duration::from_millis(200);
    let (first, stalled) = mpsc::sync_channel(1);
    first.send(()).unwrap();
    drop(first);
    let stalled = std::sync::Arc::new(std::sync::Mutex::new(stalled));
    let address = server(move |stream| {
        if stalled.lock().unwrap().recv().is_ok() {
            thread::sleep(stall);
        }
        good(stream);
    });
    // One client, so the nine that are due within 90 ms all wait for the first.
    let begin = Instant::now();
    let tally = finish(Load::new(address).new_connections(1).rate(100.0).requests(10));
    all(&tally, 10, Outcome::Ok);
    assert!(begin.elapsed() >= stall);
    let least = tally.latency(Kind::New).unwrap().min();
    assert!(least >= 100_000, "{least} µs: {tally}");
}

#[test]
fn a_rate_is_kept() {
    let address = server(good);
    let begin = Instant::now();
    let tally = finish(Load::new(address).new_connections(4).rate(500.0).requests(101));
    all(&tally, 101, Outcome::Ok);
    assert!(begin.elapsed() >= Duration::from_millis(200), "{tally}");
}

#[test]
fn a_load_ends_in_time_and_waits_for_what_is_in_flight() {
    let address = server(good);
    let duration = Duration::from_millis(50);
    let tally = finish(Load::new(address).kept(2).duration(duration));
    assert!(tally.elapsed() >= duration && tally.lossless(), "{tally}");
    let (asked, asks) = mpsc::channel();
    let (answer, answers) = mpsc::channel::<()>();
    let address = server_once(move |mut stream| {
        request(&mut stream);
        asked.send(()).unwrap();
        answers.recv().unwrap();
        let _ = stream.write_all(response("gen=1 pid=7", "Connection: close\r\n").as_bytes());
    });
    let running = Load::new(address).slow(1, 1.5).start();
    asks.recv_timeout(LONG).unwrap();
    let stopper = running.stopper();
    stopper.stop();
    assert!(!running.wait_for_end(Duration::from_millis(20)));
    answer.send(()).unwrap();
    all(&running.stop(), 1, Outcome::Ok);
}

#[test]
fn a_wait_in_vain_reports() {
    let running = Load::new(server(good)).kept(1).requests(5).start();
    let vain = running.wait_for_generation(2, LONG).unwrap_err();
    assert!(vain.to_string().contains("5 ok"), "the load had ended: {vain}");
    let running = Load::new(server(good)).kept(1).start();
    assert!(running.wait_for_generation(2, BRIEF).is_err());
}

/// Six swaps under load, and what the oracle says of them.
fn swap(control: &controls::Control, kept: usize) -> Tally {
    let running = Load::new(control.address()).new_connections(8).kept(kept).start();
    for _ in 0..6 {
        running.wait_for_more(20, LONG).unwrap();
        let generation = control.swap().unwrap();
        running.wait_for_generation(generation, LONG).unwrap();
    }
    running.stop()
}

#[test]
fn the_negative_control_reuseport_loses() {
    let control = controls::reuseport_rebind().unwrap();
    let tally = swap(&control, 2);
    control.stop();
    assert!(tally.count(Outcome::Reset) >= 6, "each swap resets one or more: {tally}");
    assert!(!tally.lossless());
    assert!(tally.ok() > 0 && tally.generations().len() == 7, "{tally}");
}

#[test]
fn the_negative_control_rebind_loses() {
    let control = controls::close_and_rebind().unwrap();
    let tally = swap(&control, 2);
    control.stop();
    assert!(tally.count(Outcome::Reset) >= 6, "each swap resets one or more: {tally}");
    assert!(!tally.lossless());
    assert!(tally.ok() > 0 && tally.generations().len() == 7, "{tally}");
}

#[test]
fn the_positive_control_loses_nothing() {
    let control = controls::same_socket().unwrap();
    let running = Load::new(control.address()).new_connections(8).kept(2).monotonic().start();
    for _ in 0..6 {
        running.wait_for_more(20, LONG).unwrap();
        let generation = control.swap().unwrap();
        running.wait_for_generation(generation, LONG).unwrap();
    }
    let tally = running.stop();
    control.stop();
    tally.assert_lossless();
    assert_eq!((tally.requests(), tally.generations().len()), (tally.ok(), 7), "{tally}");
}

#[test]
fn generations_that_go_backwards_are_found() {
    // Odd connections are answered by 2, even ones by 1, one after the other.
    let count = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let address = server(move |mut stream| {
        let generation = 2 - count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2;
        request(&mut stream);
        let body = format!("gen={generation} pid=7");
        let _ = stream.write_all(response(&body, "Connection: close\r\n").as_bytes());
    });
    let tally = finish(Load::new(address).new_connections(1).requests(10).monotonic());
    assert_eq!((tally.ok(), tally.failed(), tally.backwards()), (10, 0, 5), "{tally}");
    assert!(!tally.lossless());
    let tally = finish(Load::new(address).new_connections(1).requests(10));
    assert!(tally.lossless() && tally.backwards() == 0, "{tally}");
}
