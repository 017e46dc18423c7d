package natsservertest

import (
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Node is one server on loopback, of a cluster or, without Routes, alone.
type Node struct {
	Conf        string // configuration file, whose addresses and folder are replaced
	Name, Dir   string
	Port, Route int
	Routes      []int // all nodes' ports for routes
}

// Start runs the server until Shutdown.
func (n Node) Start() (*server.Server, error) {
	if err := os.Setenv("SERVER_NAME", n.Name); err != nil { // which the file names
		return nil, err
	}
	opts, err := server.ProcessConfigFile(n.Conf)
	if err != nil {
		return nil, err
	}
	opts.ServerName, opts.StoreDir = n.Name, n.Dir
	opts.Host, opts.Port, opts.HTTPPort = "127.0.0.1", n.Port, 0
	if len(n.Routes) > 0 {
		opts.Cluster.Host, opts.Cluster.Port = "127.0.0.1", n.Route
	}
	opts.Routes = nil
	for _, port := range n.Routes {
		opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats-route", Host: fmt.Sprintf("127.0.0.1:%d", port)})
	}
	opts.RoutesStr = ""
	opts.NoSigs, opts.NoLog = true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, err
	}
	srv.Start()
	if !srv.ReadyForConnections(20 * time.Second) {
		return nil, fmt.Errorf("node %s is not ready", n.Name)
	}
	return srv, nil
}

// URLs are the addresses of nodes for clients.
func URLs(nodes []Node) string {
	var all []string
	for _, n := range nodes {
		all = append(all, fmt.Sprintf("nats://127.0.0.1:%d", n.Port))
	}
	return strings.Join(all, ",")
}
