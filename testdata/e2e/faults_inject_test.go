package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// fault is something that goes wrong and then is over.
type fault struct {
	name   string
	nats   bool          // of NATS: may come together with one that is not
	hold   time.Duration // how long it lasts at least, to show anything
	inject func(*faultRun) (heal func())
}

// Times that a fault lasts: longer than a statement may take, or just seen.
const (
	blink  = 300 * time.Millisecond
	outage = 1500 * time.Millisecond
)

var faults = []fault{
	{"replica killed", false, blink, func(r *faultRun) func() {
		i := r.rng.IntN(len(r.replicas))
		r.open(&r.h.killed, i)
		r.replicas[i].kill()
		return func() { r.launch(i) }
	}},
	{"replica stopped", false, outage, func(r *faultRun) func() {
		i := r.rng.IntN(len(r.replicas))
		r.open(&r.h.stopped, i)
		r.signal(r.replicas[i].cmd.Process.Pid, syscall.SIGSTOP)
		return func() { r.signal(r.replicas[i].cmd.Process.Pid, syscall.SIGCONT) }
	}},
	{"postmaster killed", false, blink, func(r *faultRun) func() {
		r.pg.KillPostmaster()
		return r.pg.Restart
	}},
	{"PostgreSQL killed", false, blink, func(r *faultRun) func() {
		r.pg.Kill()
		return r.pg.Restart
	}},
	{"postmaster stopped", false, outage, func(r *faultRun) func() {
		r.signal(r.pg.Postmaster(), syscall.SIGSTOP)
		return func() { r.signal(r.pg.Postmaster(), syscall.SIGCONT) }
	}},
	{"PostgreSQL stopped", false, outage, func(r *faultRun) func() {
		r.pg.Pause()
		return r.pg.Resume
	}},
	{"one backend killed", false, blink, func(r *faultRun) func() {
		r.signal(r.backend(), syscall.SIGKILL)
		return r.pg.Recover
	}},
	{"one backend stopped", false, outage, func(r *faultRun) func() {
		pid := r.backend()
		r.signal(pid, syscall.SIGSTOP)
		return func() { r.signal(pid, syscall.SIGCONT) }
	}},
	{"all backends terminated", false, blink, func(r *faultRun) func() {
		terminate := func() {
			dbtest.Exec(r.t, r.pg.URL(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'replica-%'`)
		}
		terminate()
		return terminate
	}},
	{"standby promoted", false, blink, func(r *faultRun) func() {
		old, to := r.pg, 1-r.at
		var standby *dbtest.Server
		r.disks[to].under(func() { standby = old.Standby() })
		r.proxies[to].pointAt(standby.URL())
		time.Sleep(blink)
		if r.rng.IntN(2) == 0 {
			old.Kill()
		} else {
			old.Pause() // and nobody hears from it again
		}
		standby.Promote()
		return func() {
			old.Close()
			r.proxies[r.at].pointAt("")
			r.pg, r.at, r.w.db = standby, to, standby.URL()
		}
	}},
	{"answers of commits cut off", false, outage, func(r *faultRun) func() {
		r.proxies[r.at].cut(0.2)
		return func() { r.cuts += r.proxies[r.at].cut(0) }
	}},
	{"PostgreSQL accepts and never answers", false, outage, func(r *faultRun) func() {
		r.proxies[r.at].hang(true)
		return func() {
			r.proxies[r.at].hang(false)
			if r.rng.IntN(2) == 0 {
				r.proxies[r.at].reset()
			}
		}
	}},
	{"PostgreSQL's disk full", false, outage, func(r *faultRun) func() {
		free := r.disks[r.at].fill(r.pg.Postmaster())
		if r.rng.IntN(2) == 0 {
			r.useUpWAL()
		}
		return func() {
			free()
			r.pg.Recover()
		}
	}},
	{"NATS killed", true, blink, func(r *faultRun) func() {
		r.w.nats.Kill()
		return r.w.nats.Restart
	}},
	{"NATS away", true, 2 * outage, func(r *faultRun) func() {
		r.w.nats.Stop()
		return r.w.nats.Restart
	}},
	{"NATS stopped", true, outage, func(r *faultRun) func() {
		r.w.nats.Pause()
		return r.w.nats.Resume
	}},
	{storeDeleted, true, blink, func(r *faultRun) func() {
		r.h.storeLost = true // by the one goroutine that injects
		r.w.nats.Stop()
		r.w.nats.DeleteStore()
		return r.w.nats.Restart
	}},
	{"NATS's disk full", true, outage, func(r *faultRun) func() {
		free := r.disks[2].fill(r.w.nats.Pid())
		return func() {
			free()
			r.w.nats.Restart() // it gives JetStream up when it cannot write
		}
	}},
}

const storeDeleted = "NATS's store deleted"

// open begins a span of a replica that ready ends.
func (r *faultRun) open(spans *[]span, replica int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*spans = append(*spans, span{replica: replica, begin: r.now()})
}

func (r *faultRun) signal(pid int, s syscall.Signal) {
	r.t.Helper()
	if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		r.t.Fatalf("signal to process %d: %v", pid, err)
	}
}

// backend is a process of PostgreSQL that serves a replica, at work if any is.
func (r *faultRun) backend() int {
	r.t.Helper()
	pids := dbtest.Query[int](r.t, r.pg.URL(), `SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'replica-%' ORDER BY state = 'idle', pid`)
	if len(pids) == 0 {
		r.t.Fatal("no replica is connected to PostgreSQL")
	}
	return pids[r.rng.IntN(min(3, len(pids)))]
}

// useUpWAL makes PostgreSQL need a new WAL file, of which it keeps some ahead.
// On a full disk that is a crash.
func (r *faultRun) useUpWAL() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, r.pg.URL())
	for range 10 {
		if err == nil {
			_, err = conn.Exec(ctx, `SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()`)
		}
	}
	if conn != nil {
		conn.Close(ctx)
	}
}

// disk is a small file system of a server's own. Where mounting one is not
// allowed, as in most containers, the server may write no file at all while the
// disk is "full".
type disk struct {
	t       *testing.T
	dir     string
	mounted bool
}

// mountScript unmounts when the test is over or its process has died.
const mountScript = `read -r line; umount -l "$1"; rmdir "$1"`

func newDisk(t *testing.T, megabytes int) *disk {
	t.Helper()
	dir, err := os.MkdirTemp("", "identity-auth-disk-")
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, dir: dir}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0755", megabytes)); err != nil {
		t.Logf("no file system for a full disk (%v): a limit on the size of files takes its place", err)
		os.Remove(dir)
		return d
	}
	d.mounted = true
	janitor := exec.Command("/bin/sh", "-c", mountScript, "janitor", dir)
	janitor.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	told, err := janitor.StdinPipe()
	if err == nil {
		err = janitor.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		told.Close()
		janitor.Wait()
	})
	return d
}

// under runs f, which makes its temporary directories on the disk.
func (d *disk) under(f func()) {
	if d.mounted {
		defer d.t.Setenv("TMPDIR", os.Getenv("TMPDIR"))
		d.t.Setenv("TMPDIR", d.dir)
	}
	f()
}

// fill leaves no room on the disk, for a process and its children.
func (d *disk) fill(pid int) (free func()) {
	d.t.Helper()
	if !d.mounted {
		limit(d.t, pid, "0:")
		return func() { limit(d.t, pid, "unlimited:") }
	}
	ballast, err := os.Create(filepath.Join(d.dir, "ballast"))
	if err != nil {
		d.t.Fatal(err)
	}
	defer ballast.Close()
	size := int64(0)
	for step := int64(1 << 30); step >= 4096; {
		if err := syscall.Fallocate(int(ballast.Fd()), 0, size, step); err != nil {
			step /= 2
			continue
		}
		size += step
	}
	return func() {
		if err := os.Remove(ballast.Name()); err != nil {
			d.t.Error(err)
		}
	}
}

// limit changes the soft limit on the size of files of a process and its
// children, as their own user: even root may lack the right to in a container.
func limit(t *testing.T, pid int, fsize string) {
	t.Helper()
	pids := []string{strconv.Itoa(pid)}
	if children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)); err == nil {
		pids = append(pids, strings.Fields(string(children))...)
	}
	for _, p := range pids {
		info, err := os.Stat("/proc/" + p)
		if err != nil {
			continue // gone
		}
		owner := info.Sys().(*syscall.Stat_t)
		cmd := exec.Command("prlimit", "--pid", p, "--fsize="+fsize)
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}
		}
		if out, err := cmd.CombinedOutput(); err != nil && !strings.Contains(string(out), "No such process") {
			t.Fatalf("prlimit (of util-linux): %v %s", err, out)
		}
	}
}
