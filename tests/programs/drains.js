// A Node server that drains rightly: what it was given to do is answered, the next answer on a kept connection announces
// the close, and silent ones are closed only after a while.
'use strict';
const http = require('http');
const net = require('net');

const LINGER_MS = 500;
const identity = () => `gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`;
let draining = false;

const server = http.createServer((request, response) => {
  const slow = /^\/slow\/([\d.]+)/.exec(request.url);
  setTimeout(() => {
    if (draining) response.setHeader('Connection', 'close');
    response.end(identity());
  }, slow ? Number(slow[1]) * 1000 : 0);
});
server.keepAliveTimeout = 60000;
server.listen({ fd: 3 });

process.on('SIGTERM', () => {
  draining = true;
  // http's own close() ends idle connections at once, with a request perhaps on its way; this one only stops accepting.
  net.Server.prototype.close.call(server);
  setTimeout(() => setInterval(() => server.closeIdleConnections(), 20).unref(), LINGER_MS).unref();
});
