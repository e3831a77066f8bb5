//! Single requests, sent and answered apart.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::oracle::Answer;
use crate::wait::LONG;

/// A request that has been sent, and not answered yet.
pub(crate) struct Asked<S>(S);

/// Connects and sends a request for `path`.
pub(crate) fn ask(address: SocketAddr, path: &str) -> Asked<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, LONG).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    send(stream, path)
}

pub(crate) fn ask_unix(socket: &Path, path: &str) -> Asked<UnixStream> {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    send(stream, path)
}

fn send<S: Write>(mut stream: S, path: &str) -> Asked<S> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    Asked(stream)
}

impl<S: Read> Asked<S> {
    /// What comes, up to the end of the connection.
    pub(crate) fn try_answer(mut self) -> io::Result<String> {
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The body of the answer.
    #[track_caller]
    pub(crate) fn body(self) -> String {
        let text = self.try_answer().unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        body.to_owned()
    }

    /// Which process answered.
    #[track_caller]
    pub(crate) fn answerer(self) -> Answer {
        let body = self.body();
        Answer::parse(body.as_bytes()).unwrap_or_else(|| panic!("{body}")).0
    }
}

#[track_caller]
pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    ask(address, path).body()
}

/// A connection for several requests.
pub(crate) struct Kept(TcpStream);

impl Kept {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, LONG).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Self(stream)
    }

    #[track_caller]
    pub(crate) fn send(&mut self, path: &str) {
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes()).unwrap();
    }

    /// What comes up to `end`.
    #[track_caller]
    pub(crate) fn read_to(&mut self, end: &str) -> String {
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with(end) {
            self.0.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error} after {text:?}"));
            text.push(byte[0].into());
        }
        text
    }

    /// Whether it ends without an answer, however it does.
    pub(crate) fn is_cut_within(&mut self, time: Duration) -> bool {
        self.0.set_read_timeout(Some(time)).unwrap();
        match self.0.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Whether the server closes it in time, having said nothing more.
    #[track_caller]
    pub(crate) fn ends_within(&mut self, time: Duration) -> bool {
        self.0.set_read_timeout(Some(time)).unwrap();
        let read = self.0.read(&mut [0]);
        self.0.set_read_timeout(Some(LONG)).unwrap();
        match read {
            Ok(count) => {
                assert_eq!(count, 0, "a byte that nobody asked for");
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                false
            }
        }
    }
}
