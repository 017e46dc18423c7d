package main

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
	zlog "github.com/rs/zerolog/log"
)

var kills = flag.Int("kills", 0, "kill so many workers, and a third as often the server")

// Workers and then the server are killed under load. What the API saw again is
// no more than what was in flight.
func TestKill(t *testing.T) {
	chaos(t)
	workers, servers, drain := 30, 10, 5*time.Minute
	if *long {
		workers, servers, drain = 300, 100, 8*time.Minute
	}
	if *kills > 0 {
		workers, servers = *kills, *kills/3
	}
	f := newFleetOf(t, 1)
	f.pay = true
	stop := f.underLoad(2, 40, 8*time.Millisecond)

	flying := 0
	for range workers {
		time.Sleep(time.Duration(500+rand.IntN(700)) * time.Millisecond)
		flying += f.api.flying()
		f.kill(f.any())
		f.start()
	}
	f.balanced(2 * time.Minute)

	f.api.startGap()
	for range servers {
		time.Sleep(time.Duration(1000+rand.IntN(1000)) * time.Millisecond)
		flying += f.api.flying()
		f.killServer(0)
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
		f.startServer(0)
	}
	time.Sleep(3 * time.Second)
	stop()
	f.settled(drain)
	f.api.mu.Lock()
	again, gap := f.api.again(), f.api.gap
	f.api.mu.Unlock()
	t.Logf("%d workers and %d times the server killed: %d calls made again, %d were in flight; longest time without a call %v",
		workers, servers, again, flying, gap.Round(time.Millisecond))
	if again > flying {
		t.Errorf("%d calls were made again, and only %d in flight", again, flying)
	}
	f.api.judge(t, 10, 20)
}

// The network between workers, server and API delays, loses and cuts, and a worker is
// paused for longer than the server waits for its ack.
func TestNetworkFaults(t *testing.T) {
	chaos(t)
	faults, drain := 6, 5*time.Minute
	if *long {
		faults, drain = 150, 8*time.Minute
	}
	f := newFleetOf(t, 1)
	f.pay = true
	before := zlog.Logger
	zlog.Logger = zerolog.Nop() // what toxiproxy writes to
	defer func() { zlog.Logger = before }()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	var proxies []*toxiproxy.Proxy
	between := func(name, upstream string) string {
		p := toxiproxy.NewProxy(server, name, "127.0.0.1:0", upstream)
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		proxies = append(proxies, p)
		return p.Listen
	}
	f.through = "nats://" + between("nats", fmt.Sprintf("127.0.0.1:%d", f.nodes[0].Port))
	api := between("api", f.apiURL[len("http://"):])
	f.config = strings.Replace(f.config, f.apiURL, "http://"+api, 1)
	stop := f.underLoad(2, 40, 10*time.Millisecond)

	paused := f.workers[f.any()].Process
	_ = paused.Signal(syscall.SIGSTOP)
	resume := time.AfterFunc(35*time.Second, func() { _ = paused.Signal(syscall.SIGCONT) })
	defer resume.Stop()
	toxics := []string{
		`{"name":"t","type":"latency","attributes":{"latency":800,"jitter":400}}`,
		`{"name":"t","type":"bandwidth","attributes":{"rate":20}}`,
		`{"name":"t","type":"timeout","attributes":{"timeout":0}}`, // everything vanishes
		`{"name":"t","type":"reset_peer","attributes":{"timeout":200}}`,
		`{"name":"t","type":"slicer","attributes":{"average_size":20,"size_variation":10,"delay":1000}}`,
		`{"name":"t","type":"limit_data","attributes":{"bytes":20000}}`,
	}
	for n := range faults {
		p := proxies[rand.IntN(len(proxies))]
		toxic := toxics[n%len(toxics)]
		if rand.IntN(2) == 0 {
			toxic = strings.Replace(toxic, `"name":"t"`, `"name":"t","stream":"upstream"`, 1)
		}
		if _, err := p.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(1000+rand.IntN(3000)) * time.Millisecond)
		if err := p.Toxics.RemoveToxic(t.Context(), "t"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
	}
	time.Sleep(3 * time.Second)
	stop()
	f.settled(drain)
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	for key, n := range f.api.paid {
		if n > 1 {
			t.Errorf("%s was called %d times, and must not be called twice", key, n)
		}
	}
	t.Logf("%d network faults: %d requests were called, %d calls again", faults, len(f.api.keys), f.api.again())
}

// A request that kills its worker, in a process of its own, is a POISON dead letter.
func TestPoisonProcess(t *testing.T) {
	if !*long {
		t.Skip("takes three minutes; simulated in package consumer")
	}
	f := newFleetOf(t, 1)
	f.api.latency = time.Second
	stop := f.underLoad(1, 300, 2*time.Millisecond)
	killed := 0
	f.api.poison = func(worker string) {
		f.mu.Lock()
		defer f.mu.Unlock()
		killed++
		_ = f.workers[worker].Process.Kill()
	}
	if out, err := f.run("publish", "creator-7", "send", "{}", "--id", "poison"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for began := time.Now(); time.Since(began) < 4*time.Minute; time.Sleep(200 * time.Millisecond) {
		for name, cmd := range f.workers {
			if cmd.Process.Signal(syscall.Signal(0)) == nil && !exited(cmd.Process.Pid) {
				continue
			}
			f.mu.Lock()
			f.kill(name)
			f.start()
			f.mu.Unlock()
		}
		outcomes := map[string]int{}
		if f.collect("DLQ", 4, outcomes) == nil && outcomes["poison"] > 0 {
			break
		}
	}
	stop()
	f.settled(3 * time.Minute)
	letters := map[string]int{}
	if err := f.collect("DLQ", 4, letters); err != nil || len(letters) != 1 || killed != 3 {
		t.Errorf("dead letters %v (%v); %d workers were killed, want 3", letters, err, killed)
	}
}

// exited reports whether a child has ended and waits to be asked how.
func exited(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	for i := len(stat) - 1; i > 0; i-- {
		if stat[i] == ')' {
			return i+2 < len(stat) && stat[i+2] == 'Z'
		}
	}
	return false
}
