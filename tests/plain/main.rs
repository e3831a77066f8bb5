//! A server that knows nothing of handover: it takes its sockets by LISTEN_FDS, drains on SIGTERM, and goes wrong as PLAIN
//! in its environment says. What `handover exec` is for.
//!
//! `plain [WAY [ADDRESS…]]`: how it waits (`poll`, `epoll`, `select`, `accept`), and where it listens if it takes no sockets
//! but binds its own. An address is `IP:PORT`, `udp:IP:PORT`, `/PATH`, `./PATH` or `@NAME`.
//!
//! Drained rightly, as few programs do: a request in flight is answered, the next answer on a kept connection announces
//! the close, and a silent one is closed after a while.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::select::{FdSet, select};
use nix::sys::time::TimeVal;
use socket2::{Domain, SockAddr, Socket, Type};

const LINGER_MS: u64 = 300;
const TICK_MS: u16 = 20;

static DRAINING: AtomicBool = AtomicBool::new(false);
/// In milliseconds.
static LINGER: AtomicU64 = AtomicU64::new(LINGER_MS);
/// Where it stops listening.
static CLOSED: Mutex<Option<SocketAddr>> = Mutex::new(None);
static OPEN: AtomicUsize = AtomicUsize::new(0);
/// Loops that may still accept.
static LOOPS: AtomicUsize = AtomicUsize::new(0);

fn main() {
    let faults = Faults::from_environment();
    faults.at_start();
    LazyLock::force(&SIGNALS);
    let linger = faults.0.get("linger").map_or(LINGER_MS, |milliseconds| milliseconds.parse().unwrap());
    LINGER.store(linger, Ordering::SeqCst);
    if !faults.has("deaf") {
        let draining = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGTERM, draining.clone()).unwrap();
        thread::spawn(move || {
            while !draining.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            DRAINING.store(true, Ordering::SeqCst);
        });
    }
    let way = env::args().nth(1).unwrap_or_else(|| "poll".to_owned());
    let addresses: Vec<String> = env::args().skip(2).collect();
    let listeners = if addresses.is_empty() { passed() } else { faults.bind(&addresses) };
    for listener in listeners {
        serve_on(listener, &way);
    }
    if faults.has("notify") {
        notify(&format!("STATUS=warmed up\nREADY=1\nMAINPID={}", std::process::id()));
    }
    while !DRAINING.load(Ordering::SeqCst) || LOOPS.load(Ordering::SeqCst) > 0 || OPEN.load(Ordering::SeqCst) > 0 {
        thread::sleep(Duration::from_millis(5));
    }
    // As most servers do.
    for path in addresses.iter().filter(|address| address.starts_with(['/', '.'])) {
        let _ = fs::remove_file(path);
    }
}

fn serve_on(listener: Socket, way: &str) {
    let way = way.to_owned();
    // One that blocks in accept never comes to its end.
    let counted = usize::from(way != "accept");
    LOOPS.fetch_add(counted, Ordering::SeqCst);
    thread::spawn(move || {
        accept_all(&listener, &way);
        drop(listener);
        LOOPS.fetch_sub(counted, Ordering::SeqCst);
    });
}

fn bind(address: &str, reuse_port: bool, is_copied: bool) -> Socket {
    let (kind, address) = match address.strip_prefix("udp:") {
        Some(address) => (Type::DGRAM, address),
        None => (Type::STREAM, address),
    };
    let (domain, to) = if address.starts_with(['/', '.', '@']) {
        if !address.starts_with('@') {
            // What the run before has left.
            let _ = fs::remove_file(address);
        }
        (Domain::UNIX, SockAddr::unix(address.replace('@', "\0")).unwrap())
    } else {
        let ip: SocketAddr = address.parse().unwrap();
        (Domain::for_address(ip), ip.into())
    };
    let socket = Socket::new(domain, kind, None).unwrap();
    if domain != Domain::UNIX {
        socket.set_reuse_address(true).unwrap();
        socket.set_reuse_port(reuse_port).unwrap();
    }
    // What listens then is the copy.
    let copy = is_copied.then(|| socket.try_clone().unwrap());
    socket.bind(&to).unwrap_or_else(|error| panic!("bind {address}: {error}"));
    if kind == Type::STREAM {
        socket.listen(512).unwrap();
    }
    copy.unwrap_or(socket)
}

/// `PLAIN=name[=value],…`, for one worker only with `worker=N` among them.
struct Faults(HashMap<String, String>);

impl Faults {
    fn from_environment() -> Self {
        let text = env::var("PLAIN").unwrap_or_default();
        let parse = |fault: &str| {
            let (name, value) = fault.split_once('=').unwrap_or((fault, ""));
            (name.to_owned(), value.to_owned())
        };
        let faults: HashMap<_, _> = text.split(',').map(parse).collect();
        let of_another = faults.get("worker").is_some_and(|worker| env::var("HANDOVER_WORKER").as_ref() != Ok(worker));
        Self(if of_another { HashMap::new() } else { faults })
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn bind(&self, addresses: &[String]) -> Vec<Socket> {
        let times = self.0.get("reuseport").map_or(1, |times| times.parse().unwrap());
        let all = addresses.iter().flat_map(|address| (0..times).map(move |_| address));
        all.map(|address| bind(address, self.has("reuseport"), self.has("copy"))).collect()
    }

    fn at_start(&self) {
        if let Some(fifo) = self.0.get("hold") {
            fs::read(fifo).unwrap();
        }
        if let Some(code) = self.0.get("exit") {
            eprintln!("plain: no database at db.internal");
            exit(code.parse().unwrap());
        }
        if let Some(milliseconds) = self.0.get("extend") {
            notify("STATUS=reading a large table\nEXTEND_TIMEOUT_USEC=30000000");
            thread::sleep(Duration::from_millis(milliseconds.parse().unwrap()));
        }
        if self.has("hang") {
            thread::sleep(Duration::from_secs(600));
        }
        if let Some(milliseconds) = self.0.get("die-after") {
            let time = Duration::from_millis(milliseconds.parse().unwrap());
            thread::spawn(move || {
                thread::sleep(time);
                exit(9);
            });
        }
        if self.has("flood") {
            thread::spawn(|| {
                let mut stderr = std::io::stderr();
                while stderr.write_all(&[b'x'; 4096]).is_ok() {}
            });
        }
    }
}

fn passed() -> Vec<Socket> {
    assert_eq!(env::var("LISTEN_PID").unwrap(), std::process::id().to_string());
    let count: i32 = env::var("LISTEN_FDS").unwrap().parse().unwrap();
    // SAFETY: by the convention of LISTEN_FDS, whose LISTEN_PID is this process, these fds are open and ours; each is
    // taken once.
    (3..3 + count).map(|fd| unsafe { Socket::from_raw_fd(fd) }).collect()
}

fn accept_all(listener: &Socket, way: &str) {
    listener.set_nonblocking(way != "accept").unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    if way == "epoll" {
        epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
    }
    let own = listener.local_addr().unwrap();
    while !DRAINING.load(Ordering::SeqCst) {
        if CLOSED.lock().unwrap().as_ref().is_some_and(|closed| own.as_socket().is_some_and(|own| own == *closed)) {
            return;
        }
        match way {
            "epoll" => drop(epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(TICK_MS))),
            "select" => {
                let mut set = FdSet::new();
                set.insert(listener.as_fd());
                let _ = select(None, &mut set, None, None, &mut TimeVal::new(0, i64::from(TICK_MS) * 1000));
            }
            "poll" => drop(poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], TICK_MS)),
            _ => {}
        }
        if listener.r#type().unwrap() == Type::DGRAM {
            let mut buffer = [MaybeUninit::uninit(); 64];
            if let Ok((_, from)) = listener.recv_from(&mut buffer) {
                let _ = listener.send_to(identity().as_bytes(), &from);
            }
            continue;
        }
        OPEN.fetch_add(1, Ordering::SeqCst);
        match listener.accept() {
            // One that was told to stop meanwhile serves what it has taken.
            Ok((stream, _)) => drop(thread::spawn(move || {
                // A Unix stream does as well: it is only read and written.
                let stream = TcpStream::from(OwnedFd::from(stream));
                let _ = serve(&stream);
                drop(stream);
                OPEN.fetch_sub(1, Ordering::SeqCst);
            })),
            Err(_) => drop(OPEN.fetch_sub(1, Ordering::SeqCst)),
        }
    }
}

fn serve(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    let mut reader = BufReader::new(stream);
    while !reader.buffer().is_empty() || comes_more(stream) {
        let (mut path, mut closes, mut length) = (String::new(), DRAINING.load(Ordering::SeqCst), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if path.is_empty() {
                path = line.split(' ').nth(1).unwrap_or("/").to_owned();
            }
            closes |= line.trim().eq_ignore_ascii_case("connection: close");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
        let body = body(&path);
        closes |= DRAINING.load(Ordering::SeqCst);
        let field = if closes { "Connection: close\r\n" } else { "" };
        let length = body.len();
        let mut writer = stream;
        writer.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{field}\r\n{body}").as_bytes())?;
        if closes {
            break;
        }
    }
    Ok(())
}

/// Waits for the next request; no longer than a while once this process drains.
fn comes_more(stream: &TcpStream) -> bool {
    let mut draining_since = None;
    loop {
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(TICK_MS)).is_ok_and(|count| count > 0) {
            return true;
        }
        if DRAINING.load(Ordering::SeqCst) {
            let since: &mut Instant = draining_since.get_or_insert_with(Instant::now);
            if since.elapsed() > Duration::from_millis(LINGER.load(Ordering::SeqCst)) {
                return false;
            }
        }
    }
}

/// Whether SIGHUP and SIGUSR1 have come.
static SIGNALS: LazyLock<[Arc<AtomicBool>; 2]> = LazyLock::new(|| {
    [libc::SIGHUP, libc::SIGUSR1].map(|signal| {
        let flag = Arc::default();
        signal_hook::flag::register(signal, Arc::clone(&flag)).unwrap();
        flag
    })
});

fn body(path: &str) -> String {
    let (first, rest) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    match first {
        "slow" => {
            thread::sleep(Duration::from_secs_f64(rest.parse().unwrap_or(0.0)));
            identity()
        }
        "env" => env::var(rest).unwrap_or_default(),
        "signals" => SIGNALS.each_ref().map(|flag| u8::from(flag.load(Ordering::SeqCst)).to_string()).join(" "),
        "args" => env::args().skip(1).collect::<Vec<_>>().join(" "),
        "cwd" => env::current_dir().unwrap_or_default().display().to_string(),
        "exe" => fs::read_link("/proc/self/exe").unwrap_or_default().display().to_string(),
        "ids" => format!("{} {}", nix::unistd::getuid(), nix::unistd::getgid()),
        "child" => std::process::Command::new("sleep").arg("600").spawn().unwrap().id().to_string(),
        "orphan" => {
            let shell = std::process::Command::new("sh").args(["-c", "sleep 0.1 & echo $!"]).output().unwrap();
            String::from_utf8(shell.stdout).unwrap().trim().to_owned()
        }
        "open" => {
            serve_on(bind(rest, false, false), "poll");
            String::new()
        }
        "close" => {
            *CLOSED.lock().unwrap() = Some(rest.parse().unwrap());
            String::new()
        }
        "bind" => {
            let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            bound
                .bind(&rest.parse::<SocketAddr>().unwrap().into())
                .map_or_else(|error| error.to_string(), |()| "bound".to_owned())
        }
        "exit" => exit(rest.parse().unwrap_or(1)),
        _ => identity(),
    }
}

fn identity() -> String {
    format!("gen={} pid={}", env::var("HANDOVER_GENERATION").unwrap_or_default(), std::process::id())
}

fn notify(message: &str) {
    use std::os::linux::net::SocketAddrExt;
    let name = env::var("NOTIFY_SOCKET").unwrap();
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name.strip_prefix('@').unwrap()).unwrap();
    UnixDatagram::unbound().unwrap().send_to_addr(message.as_bytes(), &address).unwrap();
}
