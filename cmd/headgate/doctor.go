package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/internal/ownership"
	"github.com/headgate-io/headgate/publisher"
)

// finding is what a check found.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // ok, warn or fail
	Found  string `json:"found"`
	Do     string `json:"do,omitempty"`
}

const (
	isOK   = "ok"
	isWarn = "warn"
	isFail = "fail"
)

// doctor looks at a set-up and says what is wrong, and what to do.
type doctor struct {
	*session
	monitor  string
	findings []finding
	info     *jetstream.StreamInfo // of the request stream
	sync     string                // sync_interval of the servers; "": not known
	always   bool                  // every message is synced
}

func doctorCommand() *cobra.Command {
	var output, monitor string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check the servers and what is on them, and say which promise of durability holds",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := openSession(cmd)
			if err != nil {
				return err
			}
			defer s.Close()
			d := &doctor{session: s, monitor: monitor}
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			d.examine(ctx)
			header := table.Row{"check", "", "found", "what to do"}
			err = write(cmd.OutOrStdout(), output, d.findings, header, func(f finding) table.Row {
				return table.Row{f.Check, f.Status, f.Found, f.Do}
			})
			if err != nil {
				return err
			}
			if slices.ContainsFunc(d.findings, func(f finding) bool { return f.Status == isFail }) {
				return exitError{exitFailed, errors.New("something has to be done; see above")}
			}
			return nil
		},
	}
	outputFlag(cmd, &output)
	cmd.Flags().StringVar(&monitor, "monitor", "", "monitoring `URL` of a server, such as http://127.0.0.1:8222, to see how it syncs to disk")
	return cmd
}

func (d *doctor) note(check, status, do, format string, args ...any) {
	d.findings = append(d.findings, finding{check, status, fmt.Sprintf(format, args...), do})
}

func (d *doctor) examine(ctx context.Context) {
	d.version()
	d.account(ctx)
	d.topologyDrift(ctx)
	d.streams(ctx)
	d.clock(ctx)
	d.rights(ctx)
	d.owners(ctx)
	d.syncing(ctx)
	d.durability()
}

// leastServer has what Headgate uses: per-bucket limit markers came with 2.11.
var leastServer = [2]int{2, 12}

func (d *doctor) version() {
	v := d.nc.ConnectedServerVersion()
	parts := strings.SplitN(v, ".", 3)
	major, _ := strconv.Atoi(parts[0])
	minor := 0
	if len(parts) > 1 {
		minor, _ = strconv.Atoi(parts[1])
	}
	if major < leastServer[0] || major == leastServer[0] && minor < leastServer[1] {
		d.note("server version", isFail, fmt.Sprintf("install nats-server %d.%d or later; 2.15.2 is tested", leastServer[0], leastServer[1]), "%s", v)
		return
	}
	d.note("server version", isOK, "", "%s, %d servers known", v, len(d.nc.DiscoveredServers())+1)
}

func (d *doctor) account(ctx context.Context) {
	info, err := d.js.AccountInfo(ctx)
	if err != nil {
		d.note("JetStream", isFail, "enable JetStream for this account", "%v", err)
		return
	}
	limit := func(n int64) string {
		if n < 0 {
			return "no limit"
		}
		return size(uint64(n))
	}
	status, do := isOK, ""
	if max := info.Limits.MaxStore; max > 0 && float64(info.Store) > 0.8*float64(max) {
		status, do = isWarn, "give the account more storage before publishers are refused"
	}
	d.note("JetStream storage", status, do, "%s used, %s allowed", size(info.Store), limit(info.Limits.MaxStore))
	if max := info.Limits.MaxConsumers; max > 0 && max < d.cfg.Partitions {
		d.note("JetStream consumers", isFail, fmt.Sprintf("allow at least %d consumers a stream, one for each partition", d.cfg.Partitions), "%d allowed", max)
	}
}

func (d *doctor) topologyDrift(ctx context.Context) {
	changes, err := d.topology().Plan(ctx, d.js)
	switch {
	case err != nil:
		d.note("streams, consumers, buckets", isFail, "", "%v", err)
	case len(changes) == 0:
		d.note("streams, consumers, buckets", isOK, "", "as declared")
	default:
		status := isWarn
		var names []string
		for _, c := range changes {
			names = append(names, c.Action+" "+c.Kind+" "+c.Name)
			if c.Action == "create" {
				status = isFail
			}
		}
		more := ""
		if len(names) > 4 {
			more = fmt.Sprintf(" and %d more", len(names)-4)
			names = names[:4]
		}
		d.note("streams, consumers, buckets", status, "headgate setup --dry-run shows what differs, headgate setup repairs it", "setup would %s%s", strings.Join(names, ", "), more)
	}
}

// resultMemory is what the server keeps in memory for a stored result with its id
// in the subject, in bytes.
const resultMemory = 285

func (d *doctor) streams(ctx context.Context) {
	ns := d.topology().Namespace
	if s, err := d.js.Stream(ctx, ns.Stream(publisher.Requests)); err == nil {
		d.info = s.CachedInfo()
		var missing []string
		if c := d.info.Cluster; c != nil {
			for _, r := range c.Replicas {
				if r.Offline || !r.Current {
					missing = append(missing, r.Name)
				}
			}
		}
		switch have := d.info.Config.Replicas; {
		case len(missing) > 0:
			d.note("replicas", isWarn, "bring these servers back: until then fewer failures are survived", "%d, of which %s lag or are offline", have, strings.Join(missing, ", "))
		case have < d.cfg.NATS.Replicas:
			d.note("replicas", isWarn, "headgate setup", "%d, %d are configured", have, d.cfg.NATS.Replicas)
		default:
			d.note("replicas", isOK, "", "%d", have)
		}
	}
	if s, err := d.js.Stream(ctx, ns.Stream(publisher.Results)); err == nil {
		n := s.CachedInfo().State.Msgs
		status, do := isOK, ""
		if n*resultMemory > 2<<30 {
			status, do = isWarn, "keep results for a shorter time (results.max_age)"
		}
		d.note("memory of RESULTS", status, do, "%d results kept, about %s of server memory", n, size(n*resultMemory))
	}
}

func (d *doctor) clock(ctx context.Context) {
	if d.info == nil {
		return
	}
	began := time.Now()
	s, err := d.js.Stream(ctx, d.info.Config.Name)
	if err != nil {
		return
	}
	info := s.CachedInfo()
	if info.TimeStamp.IsZero() {
		return
	}
	took := time.Since(began)
	differs := info.TimeStamp.Sub(began.Add(took / 2)).Round(time.Millisecond)
	if differs.Abs() > time.Second+took {
		d.note("clocks", isWarn, "synchronise the clocks (NTP); limits that workers share are used less than they could be", "the server's is %v off this machine's", differs)
		return
	}
	d.note("clocks", isOK, "", "the server's is within %v of this machine's", max(differs.Abs(), took))
}

// rights tries what a worker does, where trying leaves nothing behind.
func (d *doctor) rights(ctx context.Context) {
	ns := d.topology().Namespace
	var lacking []string
	for _, name := range []string{publisher.Holds, publisher.Limits, publisher.Ledger, publisher.Budgets, publisher.Owners} {
		kv, err := d.js.KeyValue(ctx, ns.Stream(name))
		if err != nil {
			continue // missing, which another check says
		}
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		if _, err := kv.Get(short, "doctor"); err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
			lacking = append(lacking, "read "+kv.Bucket())
		} else if name == publisher.Ledger || name == publisher.Budgets { // others are watched
			_, err := kv.Put(short, "doctor", nil)
			if err == nil {
				err = kv.Purge(short, "doctor")
			}
			if err != nil {
				lacking = append(lacking, "write "+kv.Bucket())
			}
		}
		cancel()
	}
	if len(lacking) > 0 {
		d.note("rights", isFail, "a missing right looks like a timeout: allow these for this user", "cannot %s", strings.Join(lacking, ", "))
		return
	}
	d.note("rights", isOK, "", "buckets can be read and written")
}

func (d *doctor) owners(ctx context.Context) {
	kv, err := d.bucket(ctx, publisher.Owners)
	if err != nil {
		return
	}
	owners, err := ownership.Owners(ctx, kv)
	if err != nil {
		d.note("owners", isFail, "", "%v", err)
		return
	}
	owned := map[int]bool{}
	for _, o := range owners {
		for _, n := range o.Partitions {
			owned[n] = true
		}
	}
	switch missing := d.cfg.Partitions - len(owned); {
	case len(owners) == 0:
		d.note("owners", isWarn, "start one: headgate run", "no worker runs")
	case missing > 0:
		d.note("owners", isWarn, "wait 15 s and look again; if it stays, see the workers' logs", "%d workers; %d of %d partitions have no owner", len(owners), missing, d.cfg.Partitions)
	default:
		d.note("owners", isOK, "", "%d workers own all %d partitions", len(owners), d.cfg.Partitions)
	}
}

// syncing asks how the servers write to disk: only their monitoring knows.
func (d *doctor) syncing(ctx context.Context) {
	url := d.monitor
	if url == "" && d.server != nil {
		d.sync = "2m0s" // what an embedded server does
		d.note("sync to disk", isOK, "", "every %s (embedded server)", d.sync)
		return
	}
	if url == "" {
		d.note("sync to disk", isWarn, "name a server's monitoring with --monitor http://server:8222", "not known")
		return
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+"/varz", nil)
	if err != nil {
		d.note("sync to disk", isFail, "--monitor takes a URL such as http://127.0.0.1:8222", "%v", err)
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		d.note("sync to disk", isWarn, "is this the monitoring address of a server (http: 8222)?", "%v", err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	var varz struct {
		JetStream struct {
			Config struct {
				SyncInterval time.Duration `json:"sync_interval"`
				SyncAlways   bool          `json:"sync_always"`
			} `json:"config"`
		} `json:"jetstream"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&varz); err != nil {
		d.note("sync to disk", isWarn, "is this the monitoring address of a server (http: 8222)?", "%v", err)
		return
	}
	c := varz.JetStream.Config
	d.always, d.sync = c.SyncAlways, c.SyncInterval.String()
	if d.always {
		d.note("sync to disk", isOK, "", "always")
		return
	}
	d.note("sync to disk", isOK, "", "every %s", d.sync)
}

// durability says in one line what a PubAck means here.
func (d *doctor) durability() {
	if d.info == nil {
		return
	}
	replicas := d.info.Config.Replicas
	const what = "what a PubAck survives"
	switch {
	case replicas >= 3 && d.always:
		d.note(what, isOK, "", "the loss of %d of %d servers, and a power cut of all of them", (replicas-1)/2, replicas)
	case replicas >= 3:
		d.note(what, isOK, "for a power cut of all servers at once, set sync_interval: always", "the loss of %d of %d servers; not, for sure, a power cut of most of them at once", (replicas-1)/2, replicas)
	case d.always:
		d.note(what, isOK, "for the loss of a machine, use three servers and nats.replicas: 3", "a crash of the server and a power cut; not the loss of its disk")
	default:
		d.note(what, isOK, "sync_interval: always for power cuts; three servers and nats.replicas: 3 for the loss of one", "a crash of the server; not a power cut, which loses up to its sync interval")
	}
}

func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, i := float64(n)/unit, 0
	for ; value >= unit && i < 3; i++ {
		value /= unit
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGT"[i])
}
