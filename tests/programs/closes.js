// What most Node servers do: `server.close()` ends idle kept connections at once.
'use strict';
const server = require('http').createServer((request, response) => {
  response.end(`gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`);
});
server.keepAliveTimeout = 60000;
// A port of its own, or the socket that it is given.
server.listen(process.argv[2] ?? { fd: 3 });
process.on('SIGTERM', () => server.close());
