// An Express app; where Express is, the test script says.
'use strict';
const app = require(process.env.EXPRESS)();
app.set('etag', false);
app.use((request, response, next) => setImmediate(next));
app.get('/', (request, response) => response.send(identity()));
app.get('/slow/:seconds', (request, response) => {
  setTimeout(() => response.send(identity()), Number(request.params.seconds) * 1000);
});
const identity = () => `gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`;

const server = app.listen({ fd: 3 });
server.keepAliveTimeout = 60000;
const stop = require('./gently')(server);
process.on('SIGTERM', () => stop());
