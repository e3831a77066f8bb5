// One program for all supervisors: its generation is in a file, its socket where its supervisor has put it, and it drains as
// tests/programs/gently.js shows.
'use strict';
const generation = require('fs').readFileSync(process.env.GENERATION_FILE, 'utf8');
const server = require('http').createServer((request, response) => {
  response.end(`gen=${generation} pid=${process.pid}`);
});
server.keepAliveTimeout = 60000;
const place = /=(\d+)$/.exec(process.env.SERVER_STARTER_PORT || '');
server.listen(place ? { fd: Number(place[1]) } : { host: '127.0.0.1', port: Number(process.env.APP_PORT) });
const stop = require('../../tests/programs/gently')(server, 300);
for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop(() => process.exit(0)));
