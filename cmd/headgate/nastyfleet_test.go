package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// TestNastyFleet kills three workers in turn, and their server or servers, while ids are used again, by the
// same creator and by others, the API changes its mind and people are at work. No supervisor starts a worker
// again that ends by itself: none may.
func TestNastyFleet(t *testing.T) {
	chaos(t)
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprintf("servers=%d", servers), func(t *testing.T) { nastyFleet(t, servers) })
	}
}

func nastyFleet(t *testing.T, servers int) {
	kills := 10
	if *long {
		kills = 100
	}
	f := newFleetOf(t, servers)
	api := &mindAPI{latency: 40 * time.Millisecond}
	server := httptest.NewServer(api)
	defer server.Close()
	f.config = strings.Replace(f.config, f.apiURL, server.URL, 1)
	f.config = strings.Replace(f.config, "creator: {rate: 10/s, burst: 20, concurrency: 3}", "creator: {rate: inf, concurrency: 3}", 1)
	for range 3 {
		f.start()
	}
	f.balanced(2 * time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	busy.Go(func() { publishAgain(ctx, f.js, &f.books, 40, 8*time.Millisecond) })
	busy.Go(func() { f.people(ctx) })
	defer busy.Wait()
	defer cancel()
	within(t, patience, "calls are in flight", func() bool { return api.inFlight() > 0 })

	ended := 0
	for n := range kills {
		time.Sleep(time.Duration(500+rand.IntN(2500)) * time.Millisecond)
		ended += f.buryEnded()
		f.kill(f.any())
		f.start()
		if n%2 == 1 {
			f.hurtServers(n)
		}
	}
	time.Sleep(3 * time.Second)
	cancel()
	busy.Wait()
	f.releaseAll()
	all := allSettled(t, f.js, &f.books, 5*time.Minute)
	if t.Failed() {
		f.dump(nil)
	}
	if ended += f.buryEnded(); ended > 0 {
		t.Errorf("%d workers ended by themselves", ended)
	}
	api.judge(t, all)
}

// hurtServers kills one server, or now and then all of them.
func (f *fleet) hurtServers(n int) {
	victims := []int{rand.IntN(len(f.servers))}
	if n%6 == 5 {
		victims = victims[:0]
		for i := range f.servers {
			victims = append(victims, i)
		}
	}
	for _, i := range victims {
		f.killServer(i)
	}
	time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
	for _, i := range victims {
		f.startServer(i)
	}
	if len(f.servers) > 1 {
		time.Sleep(5 * time.Second) // or a second one goes before the first one has what it missed
	}
}

// buryEnded starts others for workers that have ended although nobody told them to, and counts them.
func (f *fleet) buryEnded() (n int) {
	for name, cmd := range f.workers {
		if !exited(cmd.Process.Pid) {
			continue
		}
		log, _ := os.ReadFile(filepath.Join(f.dir, name+".log"))
		f.t.Logf("%s ended by itself:\n%s", name, log[max(0, len(log)-1500):])
		f.kill(name)
		f.start()
		n++
	}
	return n
}

// people do what operators do, until ctx ends: they hold creators and release them, limit them, delete
// stored requests and dead letters, replay letters, and delete a consumer that setup makes again.
func (f *fleet) people(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(300+rand.IntN(1200)) * time.Millisecond):
		}
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		creator := fmt.Sprintf("creator-%d", rand.IntN(40))
		switch rand.IntN(7) {
		case 0, 1:
			f.put(short, "HOLDS", "creator."+creator, fmt.Sprintf("%ds", 1+rand.IntN(5)))
		case 2:
			if kv, err := f.js.KeyValue(short, "HOLDS"); err == nil {
				_ = kv.Delete(short, "creator."+creator)
			}
		case 3:
			f.put(short, "LIMITS", "creator."+creator, "50/s")
		case 4:
			f.removeSome(short)
		case 5:
			_, _ = f.run("dlq", "replay", "--class", "NOT_FOUND")
		case 6:
			_ = f.js.DeleteConsumer(short, "REQUESTS", fmt.Sprintf("partition-%d", rand.IntN(16)))
			time.Sleep(time.Second)
			for ctx.Err() == nil {
				if _, err := f.run("setup"); err == nil {
					break
				}
				time.Sleep(time.Second)
			}
		}
		cancel()
	}
}

func (f *fleet) put(ctx context.Context, bucket, key, value string) {
	if kv, err := f.js.KeyValue(ctx, bucket); err == nil {
		_, _ = kv.PutString(ctx, key, value)
	}
}

// removeSome deletes the oldest stored request and some dead letter.
func (f *fleet) removeSome(ctx context.Context) {
	if s, err := f.js.Stream(ctx, "REQUESTS"); err == nil && s.CachedInfo().State.Msgs > 0 {
		seq := s.CachedInfo().State.FirstSeq
		f.books.mu.Lock()
		if f.books.removed != nil {
			f.books.removed[seq] = true
		}
		f.books.mu.Unlock()
		_ = s.DeleteMsg(ctx, seq)
	}
	if s, err := f.js.Stream(ctx, "DLQ"); err == nil && s.CachedInfo().State.Msgs > 0 {
		seq := s.CachedInfo().State.FirstSeq
		m, err := s.GetMsg(ctx, seq)
		// What UNCERTAIN letters tell is needed for the judgement of a version that has no tombstones.
		if err == nil && !strings.HasPrefix(m.Subject, "dlq.UNCERTAIN.") {
			f.books.drop(m)
			_ = s.DeleteMsg(ctx, seq)
		}
	}
}

// drop remembers that the dead letter of a request is gone.
func (b *books) drop(m *jetstream.RawStreamMsg) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var seq uint64
	if _, err := fmt.Sscan(m.Header.Get("Dlq-Source-Seq"), &seq); err == nil && b.removed != nil {
		b.removed[seq] = true
	}
}

// releaseAll ends what people have put on creators.
func (f *fleet) releaseAll() {
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	for _, bucket := range []string{"HOLDS", "LIMITS"} {
		kv, err := f.js.KeyValue(ctx, bucket)
		if err != nil {
			f.t.Error(err)
			continue
		}
		keys, _ := kv.Keys(ctx)
		for _, key := range keys {
			_ = kv.Delete(ctx, key)
		}
	}
}
