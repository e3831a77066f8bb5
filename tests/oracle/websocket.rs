//! A WebSocket that is spoken to and left alone, and on which only a Close frame may announce the end.

use std::time::{Duration, Instant};

use tungstenite::client::client_with_config;
use tungstenite::error::ProtocolError;
use tungstenite::handshake::HandshakeError;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, Message};

use super::outcome::{Answer, Outcome, Trouble, excerpt};
use super::target::Target;
use super::wire::Wire;

const MAX_MESSAGE: usize = 64 * 1024;
/// How long the closing handshake may take.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// Pings and pongs passed over while waiting for one message.
const MAX_CONTROL: usize = 100;

pub struct WebSocket {
    inner: tungstenite::WebSocket<Wire>,
    /// Before the call of `connect()`.
    pub opened: Instant,
    pub answered: u64,
}

impl WebSocket {
    pub fn open(target: &Target, path: &str, deadline: Instant) -> Result<Self, Trouble> {
        let opened = Instant::now();
        let wire = Wire::connect(target, deadline)?;
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let address = format!("ws://{}{path}", target.host());
        match client_with_config(address, wire, Some(config)) {
            Ok((inner, _)) => Ok(Self { inner, opened, answered: 0 }),
            Err(HandshakeError::Failure(error)) => Err(trouble(&error)),
            Err(HandshakeError::Interrupted(_)) => {
                Err(Trouble { outcome: Outcome::TimedOut, reason: "the handshake did not end".to_owned() })
            }
        }
    }

    /// Sends `text` and reads its echo.
    pub fn echo(&mut self, text: &str, deadline: Instant) -> Result<Answer, Trouble> {
        self.inner.get_mut().set_deadline(deadline);
        let sent = self.inner.send(Message::text(text));
        // The server may have announced the close and gone before this was sent.
        let message = match (sent, self.message()) {
            (_, Ok(message)) => message,
            (Err(error), Err(_)) | (Ok(()), Err(error)) => return Err(trouble(&error)),
        };
        let body = match message {
            Message::Text(body) => body,
            Message::Close(_) => {
                self.finish();
                return Err(announced());
            }
            other => return Err(Trouble::wrong(format!("not a text: {other:?}"))),
        };
        match Answer::parse(body.as_bytes()) {
            Some((answer, rest)) if rest.strip_prefix(b" ") == Some(text.as_bytes()) => {
                self.answered += 1;
                Ok(answer)
            }
            _ => Err(Trouble::wrong(format!("not the echo: {}", excerpt(body.as_bytes())))),
        }
    }

    /// Listens until `until`, for nothing may come but pings and a Close frame.
    pub fn idle(&mut self, until: Instant) -> Result<(), Trouble> {
        self.inner.get_mut().set_deadline(until);
        match self.message() {
            Ok(Message::Close(_)) => {
                self.finish();
                Err(announced())
            }
            Ok(message) => Err(Trouble::wrong(format!("unasked: {}", excerpt(&message.into_data())))),
            Err(error) => match trouble(&error) {
                Trouble { outcome: Outcome::TimedOut, .. } => Ok(()),
                trouble => Err(trouble),
            },
        }
    }

    /// Closes as one should. What goes wrong here loses nothing.
    pub fn leave(mut self) {
        self.inner.get_mut().set_deadline(Instant::now() + CLOSE_WAIT);
        if self.inner.close(None).is_ok() {
            self.finish();
        }
    }

    fn message(&mut self) -> Result<Message, Error> {
        for _ in 0..MAX_CONTROL {
            match self.inner.read()? {
                Message::Ping(_) | Message::Pong(_) => {}
                message => return Ok(message),
            }
        }
        Err(Error::Capacity(tungstenite::error::CapacityError::MessageTooLong {
            size: MAX_CONTROL,
            max_size: MAX_CONTROL,
        }))
    }

    /// Answers the Close frame and waits for the end of the connection.
    fn finish(&mut self) {
        self.inner.get_mut().set_deadline(Instant::now() + CLOSE_WAIT);
        for _ in 0..MAX_CONTROL {
            if self.inner.read().is_err() {
                return;
            }
        }
    }
}

fn announced() -> Trouble {
    Trouble { outcome: Outcome::Announced, reason: "a Close frame".to_owned() }
}

fn trouble(error: &Error) -> Trouble {
    match error {
        Error::Io(error) => Trouble::talking(error),
        Error::Protocol(ProtocolError::HandshakeIncomplete | ProtocolError::ResetWithoutClosingHandshake) => {
            Trouble::cut("end of the connection without a Close frame")
        }
        error => Trouble::wrong(error.to_string()),
    }
}
