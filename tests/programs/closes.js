// What most Node servers do: `server.close()` ends idle kept connections at once.
'use strict';
const server = require('http').createServer((request, response) => {
  response.end(`gen=${process.env.HANDOVER_GENERATION || 1} pid=${process.pid}`);
});
server.keepAliveTimeout = 60000;
server.listen(process.env.LISTEN_FDS ? { fd: 3 } : Number(process.argv[2]), '127.0.0.1');
process.on('SIGTERM', () => server.close());
