package dbtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// cluster is one PostgreSQL server. Its methods are for one goroutine.
type cluster struct {
	bin     string // where initdb and postgres are
	dir     string // holds data and log
	port    int
	account *syscall.Credential // nil: the test's own
	more    []string            // settings that win over the common ones
	janitor *exec.Cmd
	told    io.WriteCloser // the janitor's standard input
	pid     int            // of the postmaster
	exited  chan struct{}  // closed once that has been waited for
	orphans []int          // children of a postmaster that was killed alone
}

// settings are the server's defaults; a session may change the first ones.
// Nothing survives a power cut, everything written survives a kill. The three
// first ones together leave an asynchronous commit unwritten for seconds.
var settings = []string{
	"synchronous_commit=off", "wal_writer_delay=10s", "bgwriter_lru_maxpages=0",
	"fsync=off", "full_page_writes=off", "max_connections=200", "shared_buffers=32MB",
	"listen_addresses=127.0.0.1", "unix_socket_directories=", "log_line_prefix=%m %d [%p] ",
}

// newCluster initialises a server in a directory of its own and starts it.
func newCluster(more ...string) (*cluster, error) {
	return makeCluster(more, "initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions")
}

// newStandby copies a running server and starts the copy as its standby.
func newStandby(primary *cluster) (*cluster, error) {
	return makeCluster(primary.more, "pg_basebackup", "-D", "data", "-d", fmt.Sprintf("host=127.0.0.1 port=%d user=postgres", primary.port),
		"--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync")
}

// makeCluster starts a server on the data directory that a program of
// PostgreSQL's makes.
func makeCluster(more []string, program string, args ...string) (*cluster, error) {
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	account, err := serverAccount()
	if err != nil {
		return nil, err
	}
	dir, err := tempDir(account)
	if err != nil {
		return nil, err
	}
	c := &cluster{bin: bin, dir: dir, account: account, more: more}
	if err := c.initialise(append([]string{filepath.Join(bin, program)}, args...)); err != nil {
		return nil, err
	}
	for range 5 { // another process may take a free port before the server does
		if c.port, err = freePort(); err != nil {
			break
		}
		if err = c.start(); err == nil || !strings.Contains(err.Error(), "Address already in use") {
			break
		}
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// findBinaries looks in the PATH, then where Debian keeps several versions.
func findBinaries() (dir string, err error) {
	var candidates []string
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			candidates = append(candidates, filepath.Dir(path))
		}
	}
	for version := 40; version >= 15; version-- {
		candidates = append(candidates, fmt.Sprintf("/usr/lib/postgresql/%d/bin", version))
	}
	for _, dir := range candidates {
		out, err := exec.Command(filepath.Join(dir, "postgres"), "-V").Output() // postgres (PostgreSQL) 15.1
		if err != nil {
			continue
		}
		fields := strings.Fields(string(out))
		major, _, _ := strings.Cut(fields[min(2, len(fields)-1)], ".")
		if n, err := strconv.Atoi(major); err == nil && n >= 15 {
			return dir, nil
		}
	}
	return "", errors.New("PostgreSQL 15 or later not found: apt-get install postgresql")
}

// serverAccount is who runs the server: PostgreSQL refuses to run as root.
func serverAccount() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, fmt.Errorf("no account to run PostgreSQL under: %w", err)
		}
	}
	uid, errUID := strconv.ParseUint(u.Uid, 10, 32)
	gid, errGID := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(errUID, errGID)
}

// tempDir makes a directory of the account's own, below one that it can reach.
func tempDir(account *syscall.Credential) (string, error) {
	base := os.TempDir()
	if account != nil && !reachable(base) {
		base = "/tmp"
	}
	dir, err := os.MkdirTemp(base, "identity-auth-dbtest-")
	if err != nil {
		return "", err
	}
	if account != nil {
		if err := os.Chown(dir, int(account.Uid), int(account.Gid)); err != nil {
			os.RemoveAll(dir)
			return "", err
		}
	}
	return dir, nil
}

func reachable(dir string) bool {
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
	}
}

// freePort stays below the ports that systems give to outgoing connections:
// nobody takes it while the server is down for a while.
func freePort() (int, error) {
	var err error
	for range 100 {
		port := 20000 + rand.IntN(12000)
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, err
}

// command prepares a child in the cluster's directory, under its account, and
// out of reach of a terminal's Ctrl-C, which is for the test process.
func (c *cluster) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = c.dir
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.account, Setpgid: true}
	return cmd
}

// janitorScript makes the data directory and removes it. It outlives the test
// process: its input ends when close is called or when that process dies, be it
// of kill -9. The last line is the postmaster's pid, or empty when there is
// none. A stopped server is continued so that it can obey; SIGQUIT is
// PostgreSQL's immediate shutdown, which frees its shared memory.
const janitorScript = `
trap '' PIPE
dir=$1
shift
"$@" >log 2>&1
echo $?
exec >/dev/null 2>&1
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
	kill -CONT $pid $(cat /proc/$pid/task/$pid/children)
	kill -QUIT $pid
	n=0
	while [ -e data/postmaster.pid ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
fi
rm -rf "$dir"`

// initialise starts the janitor, which runs the command that makes the data
// directory.
func (c *cluster) initialise(command []string) error {
	c.janitor = c.command("/bin/sh", append([]string{"-c", janitorScript, "janitor", c.dir}, command...)...)
	told, errIn := c.janitor.StdinPipe()
	status, errOut := c.janitor.StdoutPipe()
	if err := errors.Join(errIn, errOut, c.janitor.Start()); err != nil {
		os.RemoveAll(c.dir)
		return err
	}
	c.told = told
	if line, _ := bufio.NewReader(status).ReadString('\n'); line != "0\n" {
		err := fmt.Errorf("%s: exit status %q\n%s", filepath.Base(command[0]), line, c.logTail())
		c.close()
		return err
	}
	return nil
}

// close stops the server and removes its directory.
func (c *cluster) close() {
	c.told.Close()
	c.janitor.Wait()
}

func (c *cluster) logTail() []byte {
	text, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return text[max(0, len(text)-4096):]
}

func (c *cluster) url(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", c.port, database)
}

// start starts the server and waits until it answers.
func (c *cluster) start() error {
	for _, pid := range c.orphans { // PostgreSQL refuses to start beside them
		if err := waitState(pid, "Z"); err != nil {
			return err
		}
	}
	c.orphans = nil
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-D", "data", "-p", strconv.Itoa(c.port)}
	for _, s := range slices.Concat(settings, c.more) {
		args = append(args, "-c", s)
	}
	cmd := c.command(filepath.Join(c.bin, "postgres"), args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	c.pid, c.exited = cmd.Process.Pid, exited
	fmt.Fprintln(c.told, c.pid)
	go func() {
		cmd.Wait()
		fmt.Fprintln(c.told)
		close(exited)
	}()
	return c.waitReady()
}

func (c *cluster) waitReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, c.url("postgres"))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-c.exited:
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
			continue
		}
		return fmt.Errorf("PostgreSQL did not start: %w\n%s", err, c.logTail())
	}
}

func (c *cluster) running() bool {
	select {
	case <-c.exited:
		return false
	default:
		return true
	}
}

// stop shuts down cleanly, disconnecting clients (PostgreSQL's fast shutdown).
func (c *cluster) stop() error {
	if err := syscall.Kill(c.pid, syscall.SIGINT); err != nil {
		return err
	}
	select {
	case <-c.exited:
		return nil
	case <-time.After(patience):
		return errors.New("PostgreSQL did not stop")
	}
}

// freeze stops every process of the server, the postmaster first so that no
// new one appears, and returns their pids in that order.
func (c *cluster) freeze() ([]int, error) {
	if err := syscall.Kill(c.pid, syscall.SIGSTOP); err != nil {
		return nil, err
	}
	if err := waitState(c.pid, "T"); err != nil {
		return nil, err
	}
	pids, err := c.processes()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids[1:] {
		syscall.Kill(pid, syscall.SIGSTOP) // fails only for one that is gone
		err = errors.Join(err, waitState(pid, "TZ"))
	}
	return pids, err
}

func (c *cluster) thaw() error {
	pids, err := c.processes()
	for _, pid := range slices.Backward(pids) {
		syscall.Kill(pid, syscall.SIGCONT)
	}
	return err
}

// kill ends every process at once, as a crash of the machine would, and waits
// until none is left that could still write.
func (c *cluster) kill() error {
	pids, err := c.freeze()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-c.exited
	for _, pid := range pids[1:] {
		err = errors.Join(err, waitState(pid, "Z")) // a zombie stays where init does not care
	}
	return err
}

// killPostmaster kills that process alone. Its children leave when they notice.
func (c *cluster) killPostmaster() error {
	pids, err := c.processes()
	if err != nil {
		return err
	}
	c.orphans = pids[1:]
	if err := syscall.Kill(c.pid, syscall.SIGKILL); err != nil {
		return err
	}
	<-c.exited
	return nil
}

// recover waits until the server answers, and starts it if it has ended.
func (c *cluster) recover() error {
	err := c.waitReady()
	if err != nil && !c.running() {
		return c.start()
	}
	return err
}

// processes lists the postmaster and its children. It needs Linux.
func (c *cluster) processes() ([]int, error) {
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", c.pid, c.pid))
	if err != nil {
		return nil, err
	}
	pids := []int{c.pid}
	for field := range bytes.FieldsSeq(list) {
		pid, err := strconv.Atoi(string(field))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// waitState waits until a process is in one of the states, or gone.
func waitState(pid int, states string) error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // pid (command) state ...
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return nil
		}
		if err != nil {
			return err
		}
		if after := stat[bytes.LastIndexByte(stat, ')')+1:]; len(after) > 1 && strings.IndexByte(states, after[1]) >= 0 {
			return nil
		}
	}
	return fmt.Errorf("process %d does not get into state %s", pid, states)
}
