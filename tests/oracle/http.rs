//! HTTP/1.1 as strict as a client can be: an answer counts only when its own framing shows that it is complete.

use super::connection::Connection;
use super::outcome::{Answer, Trouble, excerpt};
use super::target::Target;

const MAX_LINE: usize = 8 * 1024;
const MAX_FIELDS: usize = 100;
const MAX_INTERIM: usize = 8;
const MAX_BODY: usize = 1024 * 1024;

/// Renders a request; a body makes it a POST.
pub fn request(target: &Target, path: &str, closes: bool, body: Option<&[u8]>) -> Vec<u8> {
    let method = if body.is_some() { "POST" } else { "GET" };
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", target.host());
    if closes {
        head.push_str("Connection: close\r\n");
    }
    if let Some(body) = body {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    let mut request = head.into_bytes();
    request.extend_from_slice(body.unwrap_or_default());
    request
}

/// A whole response with status 200.
#[derive(Debug)]
pub struct Response {
    pub body: Vec<u8>,
    /// The server announced that it closes the connection.
    pub closes: bool,
}

/// Reads one response. On trouble the connection is of no more use.
pub fn response(connection: &mut Connection) -> Result<Response, Trouble> {
    for _ in 0..MAX_INTERIM {
        let head = Head::read(connection)?;
        match head.status {
            200 => {
                let body = if head.chunked { chunked(connection)? } else { head.counted(connection)? };
                return Ok(Response { body, closes: head.closes });
            }
            100 | 102..=199 => {}
            status => return Err(Trouble::wrong(format!("status {status}"))),
        }
    }
    Err(Trouble::wrong("too many interim responses"))
}

struct Head {
    status: u16,
    closes: bool,
    chunked: bool,
    length: Option<usize>,
}

impl Head {
    fn read(connection: &mut Connection) -> Result<Self, Trouble> {
        let line = line(connection)?;
        let (minor, status) =
            status(&line).ok_or_else(|| Trouble::wrong(format!("no status line: {}", excerpt(&line))))?;
        // HTTP/1.0 closes unless it says otherwise, and a client of 1.1 does not ask it to.
        let mut head = Self { status, closes: minor == 0, chunked: false, length: None };
        for _ in 0..MAX_FIELDS {
            let line = self::line(connection)?;
            if line.is_empty() {
                return match (head.chunked, head.length) {
                    (true, Some(_)) => Err(Trouble::wrong("both Content-Length and Transfer-Encoding")),
                    _ => Ok(head),
                };
            }
            head.field(&line).ok_or_else(|| Trouble::wrong(format!("malformed field: {}", excerpt(&line))))?;
        }
        Err(Trouble::wrong(format!("more than {MAX_FIELDS} fields")))
    }

    fn field(&mut self, line: &[u8]) -> Option<()> {
        let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if name.is_empty() || !name.bytes().all(token) {
            return None;
        }
        let value = value.trim_matches([' ', '\t']);
        if name.eq_ignore_ascii_case("connection") {
            self.closes |= value.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            self.chunked = value.eq_ignore_ascii_case("chunked");
            return self.chunked.then_some(());
        } else if name.eq_ignore_ascii_case("content-length") {
            if self.length.is_some() || value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            self.length = Some(value.parse().ok()?);
        }
        Some(())
    }

    fn counted(&self, connection: &mut Connection) -> Result<Vec<u8>, Trouble> {
        match self.length {
            Some(length) if length <= MAX_BODY => connection.bytes(length),
            Some(length) => Err(Trouble::wrong(format!("a body of {length} bytes is too large"))),
            // Such a body ends with the connection, and then a cut cannot be told from the end.
            None => Err(Trouble::wrong("neither Content-Length nor chunked")),
        }
    }
}

fn line(connection: &mut Connection) -> Result<Vec<u8>, Trouble> {
    let mut line = connection.line(MAX_LINE)?;
    if !line.ends_with(b"\r\n") {
        return Err(Trouble::wrong(format!("a line without carriage return: {}", excerpt(&line))));
    }
    line.truncate(line.len() - 2);
    Ok(line)
}

fn status(line: &[u8]) -> Option<(u8, u16)> {
    let line = std::str::from_utf8(line).ok()?.strip_prefix("HTTP/1.")?;
    let (minor, rest) = line.split_once(' ')?;
    let minor = match minor {
        "0" => 0,
        "1" => 1,
        _ => return None,
    };
    let (code, _reason) = rest.split_once(' ').unwrap_or((rest, ""));
    let valid = code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_digit());
    Some((minor, code.parse().ok().filter(|code| valid && *code >= 100)?))
}

fn chunked(connection: &mut Connection) -> Result<Vec<u8>, Trouble> {
    let mut body = vec![];
    loop {
        let line = self::line(connection)?;
        let size =
            chunk_size(&line).ok_or_else(|| Trouble::wrong(format!("malformed chunk size: {}", excerpt(&line))))?;
        if size == 0 {
            return trailers(connection).map(|()| body);
        }
        if body.len().saturating_add(size) > MAX_BODY {
            return Err(Trouble::wrong(format!("a body of more than {MAX_BODY} bytes is too large")));
        }
        body.extend(connection.bytes(size)?);
        if connection.bytes(2)? != b"\r\n" {
            return Err(Trouble::wrong("a chunk longer than its size"));
        }
    }
}

fn chunk_size(line: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(line).ok()?;
    let (digits, _extension) = line.split_once(';').unwrap_or((line, ""));
    let digits = digits.trim_end_matches([' ', '\t']);
    let valid = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    usize::from_str_radix(digits, 16).ok().filter(|_| valid)
}

fn trailers(connection: &mut Connection) -> Result<(), Trouble> {
    for _ in 0..MAX_FIELDS {
        if line(connection)?.is_empty() {
            return Ok(());
        }
    }
    Err(Trouble::wrong(format!("more than {MAX_FIELDS} trailers")))
}

/// What the body of an answer must be.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// `gen=<generation> pid=<pid>`, with or without a line feed.
    Identity,
    /// `line 1 of 20` to `line 20 of 20`, a line each.
    Lines(u32),
}

impl Expected {
    /// Who answered, if the body says it.
    pub fn check(self, body: &[u8]) -> Result<Option<Answer>, Trouble> {
        match self {
            Expected::Identity => match Answer::parse(body) {
                Some((answer, b"" | b"\n")) => Ok(Some(answer)),
                _ => Err(Trouble::wrong(format!("the body is not `gen=… pid=…`: {}", excerpt(body)))),
            },
            Expected::Lines(count) => {
                let lines: String = (1..=count).map(|line| format!("line {line} of {count}\n")).collect();
                if body == lines.as_bytes() {
                    return Ok(None);
                }
                let same = body.iter().zip(lines.as_bytes()).take_while(|(a, b)| a == b).count();
                Err(Trouble::wrong(format!(
                    "the body is not the {count} lines: it departs at byte {same} with {}",
                    excerpt(&body[same..])
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::outcome::Outcome;
    use super::super::wire::Wire;
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::io::Write;
    use std::net::Shutdown;
    use std::thread;
    use std::time::Instant;

    /// Parses `bytes` as they come in `pieces` of so many bytes; true if bytes were left.
    fn parse(bytes: &[u8], piece: usize) -> (Result<Response, Trouble>, bool) {
        let (near, far) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                for piece in bytes.chunks(piece) {
                    // The reader may be gone by now: it has seen enough.
                    if (&far).write_all(piece).is_err() {
                        return;
                    }
                }
                let _ = far.shutdown(Shutdown::Write);
            });
            let mut connection = Connection::new(Wire::from(near), Instant::now());
            let response = response(&mut connection);
            (response, connection.nothing_follows().is_err())
        })
    }

    fn outcome(bytes: &str) -> Outcome {
        let whole = parse(bytes.as_bytes(), bytes.len().max(1)).0;
        let dribbled = parse(bytes.as_bytes(), 1).0;
        let outcome = |result: Result<Response, Trouble>| match result {
            Ok(_) => Outcome::Ok,
            Err(trouble) => trouble.outcome,
        };
        let (whole, dribbled) = (outcome(whole), outcome(dribbled));
        assert_eq!(whole, dribbled, "{bytes:?}");
        whole
    }

    #[test]
    fn a_counted_body_is_read() {
        for piece in [1, 3, 1000] {
            let (response, more) = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", piece);
            let response = response.unwrap();
            assert_eq!((response.body.as_slice(), response.closes, more), (&b"hello"[..], false, false));
        }
    }

    #[test]
    fn a_chunked_body_is_read() {
        let text = "HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\nConnection: x, Close\r\n\r\n\
                    5\r\nhello\r\n6;name=value\r\n world\r\n0\r\nTrailer: x\r\n\r\n";
        for piece in [1, 7, 1000] {
            let (response, more) = parse(text.as_bytes(), piece);
            let response = response.unwrap();
            assert_eq!((response.body.as_slice(), response.closes, more), (&b"hello world"[..], true, false));
        }
    }

    #[test]
    fn every_proper_prefix_of_a_response_is_cut() {
        let texts = [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ];
        for text in texts {
            for length in 0..text.len() {
                assert_eq!(outcome(&text[..length]), Outcome::Cut, "{length} bytes of {text:?}");
            }
            assert_eq!(outcome(text), Outcome::Ok);
        }
    }

    #[test]
    fn interim_responses_are_passed_over() {
        assert_eq!(outcome("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), Outcome::Ok);
        assert_eq!(outcome(&"HTTP/1.1 103 Early\r\n\r\n".repeat(20)), Outcome::Wrong);
    }

    #[test]
    fn what_is_malformed_is_wrong() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n", "x".repeat(MAX_LINE));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(MAX_FIELDS + 1));
        for bad in [
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 +20 OK\r\n\r\n",
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nbad name: 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
            long.as_str(),
            many.as_str(),
        ] {
            assert_eq!(outcome(bad), Outcome::Wrong, "{bad:?}");
        }
    }

    #[test]
    fn a_close_is_announced_by_field_or_version() {
        let closes = |text: &str| parse(text.as_bytes(), 1000).0.unwrap().closes;
        assert!(!closes("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(!closes("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"));
        assert!(closes("HTTP/1.1 200 OK\r\nCONNECTION: CLOSE\r\nContent-Length: 0\r\n\r\n"));
        assert!(closes("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"));
    }

    #[test]
    fn bytes_after_a_response_are_seen() {
        // All comes before the first read.
        let (near, far) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        (&far).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n12").unwrap();
        let mut connection = Connection::new(Wire::from(near), Instant::now());
        assert_eq!(response(&mut connection).unwrap().body, b"1");
        assert!(connection.nothing_follows().is_err());
    }

    #[test]
    fn bodies_are_held_to_their_shape() {
        let identity = |body: &str| Expected::Identity.check(body.as_bytes()).is_ok();
        assert!(identity("gen=1 pid=2") && identity("gen=1 pid=2\n"));
        assert!(!identity("") && !identity("gen=1 pid=2 ") && !identity("gen=1 pid=2\n\n"));
        let lines = |body: &str| Expected::Lines(2).check(body.as_bytes()).is_ok();
        assert!(lines("line 1 of 2\nline 2 of 2\n"));
        assert!(!lines("line 1 of 2\n") && !lines("line 2 of 2\nline 1 of 2\n") && !lines(""));
        assert!(!lines("line 1 of 2\nline 2 of 2\nline 3 of 2\n"));
    }
}
