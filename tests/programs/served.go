// A Go server with the standard library only, on a socket from LISTEN_FDS, or on an address of its own: `served announces`
// drains without loss; `served closes` does what most do; `served closes :8080` binds.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const linger = 500 * time.Millisecond

var draining atomic.Bool

func answer(response http.ResponseWriter, request *http.Request) {
	if seconds := strings.TrimPrefix(request.URL.Path, "/slow/"); seconds != request.URL.Path {
		wanted, err := strconv.ParseFloat(seconds, 64)
		if err != nil {
			http.Error(response, err.Error(), http.StatusBadRequest)
			return
		}
		time.Sleep(time.Duration(wanted * float64(time.Second)))
	}
	if draining.Load() {
		response.Header().Set("Connection", "close")
	}
	fmt.Fprintf(response, "gen=%s pid=%d", os.Getenv("HANDOVER_GENERATION"), os.Getpid())
}

func listen() (net.Listener, error) {
	if len(os.Args) > 2 {
		return net.Listen("tcp", os.Args[2])
	}
	if os.Getenv("LISTEN_FDS") != "1" || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		log.Fatal("one socket is wanted in LISTEN_FDS")
	}
	return net.FileListener(os.NewFile(3, "http"))
}

func main() {
	listener, err := listen()
	if err != nil {
		log.Fatal(err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	server := &http.Server{Handler: http.HandlerFunc(answer)}
	go server.Serve(listener)
	<-stop
	if os.Args[1] == "announces" {
		// Nothing new is accepted, and the next answer on each kept connection is its last.
		// (SetKeepAlivesEnabled(false) would close the idle ones at once, as Shutdown does.)
		draining.Store(true)
		listener.Close()
		time.Sleep(linger)
	}
	server.Shutdown(context.Background())
}
