// A plain Node server that drains rightly.
'use strict';
const server = require('http').createServer((request, response) => {
  const slow = /^\/slow\/([\d.]+)/.exec(request.url);
  setTimeout(() => {
    response.end(`gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`);
  }, slow ? Number(slow[1]) * 1000 : 0);
});
server.keepAliveTimeout = 60000;
// A port of its own, or the socket that it is given.
server.listen(process.argv[2] ?? { fd: 3 });
const stop = require('./gently')(server);
process.on('SIGTERM', () => stop());
