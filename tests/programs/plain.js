// What Node's documentation begins with: nothing in it knows of signals.
'use strict';
require('http').createServer((request, response) => {
  response.end(`gen=${process.env.HANDOVER_GENERATION} pid=${process.pid}`);
}).listen(process.argv[2]);
