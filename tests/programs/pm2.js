// Written for pm2, with `wait_ready` and `shutdown_with_message`: it says when it can serve, and is told to stop by
// message.
'use strict';
const server = require('http').createServer((request, response) => {
  const slow = /^\/slow\/([\d.]+)/.exec(request.url);
  setTimeout(() => {
    response.end(`gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`);
  }, slow ? Number(slow[1]) * 1000 : 0);
});
server.keepAliveTimeout = 60000;
server.listen({ fd: 3 }, () => {
  if (process.env.APP_NEVER_READY) return;
  setTimeout(() => process.send('ready'), 200);
});
const stop = require('./gently')(server);
process.on('SIGTERM', () => {
  console.error('a signal, where a message was due');
  process.exit(1);
});
process.on('message', (message) => {
  if (message !== 'shutdown') return;
  console.error('its own drain code runs');
  stop(() => process.exit(0));
});
