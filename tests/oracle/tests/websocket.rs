//! WebSockets.

use tungstenite::{Message, WebSocket, accept};

use super::*;

/// Echoes `messages` messages, then does as `then` says.
fn websocket(messages: usize, then: impl Fn(&mut WebSocket<TcpStream>) + Send + Sync + Clone + 'static) -> SocketAddr {
    server(move |stream| {
        let Ok(mut socket) = accept(stream) else { return };
        for _ in 0..messages {
            let Some(text) = text(&mut socket) else { return };
            let _ = socket.send(Message::Ping(Default::default()));
            if socket.send(Message::text(format!("gen=5 pid=6 {text}"))).is_err() {
                return;
            }
        }
        then(&mut socket);
    })
}

/// The next text, past the pongs.
fn text(socket: &mut WebSocket<TcpStream>) -> Option<String> {
    loop {
        match socket.read().ok()? {
            Message::Text(text) => return Some(text.to_string()),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

fn close(socket: &mut WebSocket<TcpStream>) {
    let _ = socket.close(None);
    while socket.read().is_ok() {}
}

#[test]
fn messages_are_echoed() {
    let address = websocket(usize::MAX, |_| ());
    let tally = finish(Load::new(address).websocket(2).interval(BRIEF).requests(50));
    all(&tally, 50, Outcome::Ok);
    assert_eq!(tally.generations().get(&5), Some(&50));
    assert_eq!(tally.closes(), Closes::default());
}

#[test]
fn a_close_frame_is_no_failure() {
    let tally = finish(Load::new(websocket(3, close)).websocket(1).interval(BRIEF).requests(20));
    assert_eq!((tally.failed(), tally.requests()), (0, 20), "{tally}");
    // Whether the next message was on its way when the frame came is a matter of luck.
    assert_eq!(tally.ok() + tally.count(Outcome::Announced), 20, "{tally}");
    assert!(tally.lossless() && tally.closes().announced >= 4, "{tally}");
}

#[test]
fn a_close_frame_instead_of_an_echo_is_counted_apart() {
    let address = server(|stream| {
        let Ok(mut socket) = accept(stream) else { return };
        let _ = socket.read();
        close(&mut socket);
    });
    let tally = finish(Load::new(address).websocket(1).interval(BRIEF).requests(5));
    assert_eq!((tally.requests(), tally.count(Outcome::Announced), tally.failed()), (5, 5, 0), "{tally}");
    assert!(!tally.lossless(), "nothing was answered: {tally}");
}

#[test]
fn the_end_of_a_websocket_without_a_close_frame_is_cut() {
    let shut = |socket: &mut WebSocket<TcpStream>| {
        let _ = socket.get_ref().shutdown(Shutdown::Both);
    };
    // In place of the echo of the second message: the client says nothing before it.
    let address = websocket(1, move |socket| {
        text(socket);
        shut(socket);
    });
    let tally = finish(Load::new(address).websocket(1).interval(BRIEF).requests(10));
    assert_eq!((tally.ok(), tally.count(Outcome::Cut), tally.failed()), (5, 5, 5), "{tally}");
    // While the client is silent: the end counts, though no message was lost.
    let address = websocket(1, shut);
    let running = Load::new(address).websocket(1).interval(LONG).start();
    running.wait_for(|tally| tally.count(Outcome::Cut) == 1, LONG).unwrap();
    let tally = running.stop();
    assert_eq!((tally.ok(), tally.failed()), (1, 1), "{tally}");
    // In the handshake.
    all(&finish(Load::new(once(String::new())).websocket(1).interval(BRIEF).requests(3)), 3, Outcome::Cut);
    let refusing = once(response("gen=1 pid=7", ""));
    all(&finish(Load::new(refusing).websocket(1).interval(BRIEF).requests(3)), 3, Outcome::Wrong);
}

#[test]
fn a_wrong_echo_on_a_websocket_is_wrong() {
    let address = server(|stream| {
        let Ok(mut socket) = accept(stream) else { return };
        let _ = socket.read();
        let _ = socket.send(Message::text("gen=5 pid=6 other"));
        let _ = socket.read();
    });
    all(&finish(Load::new(address).websocket(1).interval(BRIEF).requests(3)), 3, Outcome::Wrong);
}
