// Ends an HTTP server of Node's without losing a request on a kept connection; `server.close()` ends idle ones at once,
// with the next request perhaps on its way. Works for whatever is built on `http`, Express among it.
'use strict';
const net = require('net');

// stop = gently(server): to be called once, when the program is told to stop.
module.exports = (server, lingerMs = 500) => {
  let draining = false;
  // When the answer begins, not when the request comes: it may have come long before.
  server.prependListener('request', (request, response) => {
    const writeHead = response.writeHead;
    response.writeHead = function (...head) {
      if (draining) this.setHeader('Connection', 'close');
      return writeHead.apply(this, head);
    };
  });
  return (done) => {
    draining = true;
    // http's own close() ends idle connections, too; this one only stops accepting.
    net.Server.prototype.close.call(server, done);
    setTimeout(() => setInterval(() => server.closeIdleConnections(), 20).unref(), lingerMs).unref();
  };
};
