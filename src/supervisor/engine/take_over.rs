//! The end of a server that this one's program has replaced: told to stop when the program serves, and never before; unless
//! the two may not run at the same time.

use std::time::Instant;

use super::Supervisor;
use crate::error::Error;
use crate::supervisor::connections;
use crate::supervisor::machine::Phase;
use crate::supervisor::sockets::Sockets;
use crate::supervisor::take_over::TakenOver;

impl Supervisor {
    /// Finds the server, and keeps what it listens on.
    pub(super) fn find_server(&mut self) -> Result<(), Error> {
        let Some(pid) = self.options.take_over else { return Ok(()) };
        let (server, taken) = TakenOver::find(pid, &self.options.listen)?;
        for socket in taken {
            log::info!("process {pid} listens on {}", socket.address);
            let keep = self.sockets.kept.take_over(socket.fd, socket.address);
            keep.map_err(|error| Error::io(format!("take over process {pid}"), error))?;
        }
        self.taken_over = Some(server);
        Ok(())
    }

    /// The program serves.
    pub(super) fn tell_server_to_stop(&mut self) {
        let Some(server) = self.taken_over.as_mut().filter(|server| !server.is_told) else { return };
        let open = connections::open(&[server.pid], &self.sockets.addresses()).first().copied().unwrap_or(0);
        let (signal, timeout) = (self.options.stop_signal, self.options.drain_timeout);
        log::info!("process {} is told to stop by {signal}: it has {open} connections open", server.pid);
        server.tell_to_stop(signal.0, self.sockets.kept.paths());
        self.timers.taken_over = (!timeout.is_zero()).then(|| Instant::now() + timeout);
    }

    /// Looks at what has become of it.
    pub(super) fn look_at_server(&mut self) {
        let Some(server) = self.taken_over.as_mut().filter(|server| server.is_told) else { return };
        server.keep_paths();
        if server.is_gone() {
            log::info!("process {} has ended: this supervisor has taken its place", server.pid);
            self.taken_over = None;
            self.timers.taken_over = None;
            if !self.options.overlap && self.machine.phase() == Phase::Starting {
                self.start();
            }
        }
    }

    /// Its drain timeout is over.
    pub(super) fn cut_server(&mut self) {
        let Some(server) = &self.taken_over else { return };
        let open = connections::open(&[server.pid], &self.sockets.addresses()).first().copied().unwrap_or(0);
        log::warn!("process {} was told to stop and has not ended: it is killed, with {open} connections", server.pid);
        server.kill();
        self.cut += open;
    }

    /// The program does not serve: the server goes on as if nothing had happened, with all that it has.
    pub(super) fn leave_server_alone(sockets: &mut Sockets, server: Option<TakenOver>) {
        if let Some(server) = server.filter(|server| !server.is_told) {
            log::info!("process {} serves on", server.pid);
            sockets.forget_kept();
        }
    }
}
