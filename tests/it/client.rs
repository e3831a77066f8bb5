//! Single requests, sent and answered apart.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

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
