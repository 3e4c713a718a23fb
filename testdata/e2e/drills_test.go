package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// drill runs a script of deploy/drills and, while it runs, the hooks that it
// asks for: the value of a variable that names a hook is a command that has
// this test do it.
func drill(t *testing.T, name string, vars map[string]string, hooks map[string]func()) (out string, passed bool) {
	t.Helper()
	type request struct {
		do   func()
		done chan struct{}
	}
	asked := make(chan request)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req := request{hooks[strings.TrimPrefix(r.URL.Path, "/")], make(chan struct{})}
		asked <- req
		<-req.done
	})}
	go server.Serve(l)
	defer server.Close()

	postgres, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	cmd := exec.Command("bash", "../../deploy/drills/"+name+".sh")
	cmd.Env = append(os.Environ(), "PATH="+strings.Join(append([]string{os.Getenv("PATH")}, postgres...), ":"))
	for k, v := range vars {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	for hook := range hooks {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=curl -fsS http://%s/%s", hook, l.Addr(), hook))
	}
	var both bytes.Buffer
	cmd.Stdout, cmd.Stderr = &both, &both
	ended := make(chan error)
	go func() { ended <- cmd.Run() }()
	for {
		select {
		case req := <-asked: // on the test's own goroutine, which may fail
			req.do()
			close(req.done)
		case err := <-ended:
			return both.String(), err == nil
		}
	}
}

// mustPass and mustFail are drill with the verdict that is wanted; a drill that
// fails says why.
func mustPass(t *testing.T, name string, vars map[string]string, hooks map[string]func()) {
	t.Helper()
	if out, passed := drill(t, name, vars, hooks); !passed {
		t.Errorf("the drill failed:\n%s", out)
	}
}

func mustFail(t *testing.T, why, name string, vars map[string]string, hooks map[string]func()) {
	t.Helper()
	if out, passed := drill(t, name, vars, hooks); passed || !strings.Contains(out, "FAILED: "+why) {
		t.Errorf("the drill did not say %q; it passed: %v\n%s", why, passed, out)
	}
}

func (s *service) hangup() string { return fmt.Sprintf("kill -HUP %d", s.cmd.Process.Pid) }

func TestDrillKeyRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	keys := keyFiles(t.TempDir())
	pair := keyPair()
	keys.write(t, signing{pair: pair, kid: "of-old"}, signing{}, signing{})
	s := w.start(cheap, unlimited, keys.env())
	binary, err := racyBinary()
	if err != nil {
		t.Fatal(err)
	}
	vars := map[string]string{
		"BASE": s.base, "KEYS_DIR": string(keys), "RELOAD": s.hangup(), "KEYGEN": binary + " keygen", "FETCH_WAIT": "1", "ACCESS_TTL": "1",
	}
	mustPass(t, "key-rotation", vars, nil)
	// An operator who forgets to keep the old key.
	vars["RELOAD"] = fmt.Sprintf("cd %s && : >JWT_PREV_KID && : >JWT_PREV_PUBLIC_KEY_PEM && %s", keys, s.hangup())
	mustFail(t, "the key set holds", "key-rotation", vars, nil)
}

func TestDrillSecretRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir := t.TempDir()
	files := map[string]string{}
	for _, name := range []string{"ADMIN_TOKEN", "REGISTER_TOKEN"} {
		files[name+"_FILE"] = filepath.Join(dir, name)
		if err := os.WriteFile(files[name+"_FILE"], []byte(strings.Repeat(name, 4)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	admin := "127.0.0.1:" + freePort(t)
	s := w.start(cheap, unlimited, env{"ADMIN_ADDR": admin}, env(files))
	vars := map[string]string{"BASE": s.base, "ADMIN_BASE": "http://" + admin, "RELOAD": s.hangup()}
	for k, v := range files {
		vars[k] = v
	}
	mustPass(t, "secret-rotation", vars, nil)
	vars["RELOAD"] = "true"
	mustFail(t, "the new ADMIN_TOKEN works", "secret-rotation", vars, nil)
}

func TestDrillBackupRestore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.start(cheap, unlimited)
	restore := func(sabotage func(url string)) (vars map[string]string, hooks map[string]func()) {
		into, port := dbtest.Empty(t), freePort(t)
		vars = map[string]string{"BASE": s.base, "DATABASE_URL": w.db, "RESTORE_URL": into, "RESTORED": "http://127.0.0.1:" + port}
		// A NATS of its own: the restored database tells of another history.
		return vars, map[string]func(){"START": func() {
			sabotage(into)
			w.start(cheap, unlimited, env{"DATABASE_URL": into, "NATS_URL": natstest.New(t).URL(), "PORT": port})
		}}
	}
	vars, hooks := restore(func(string) {})
	mustPass(t, "backup-restore", vars, hooks)
	vars, hooks = restore(func(url string) { dbtest.Exec(t, url, `DELETE FROM identity_auth.sessions`) })
	mustFail(t, "refresh: got 401", "backup-restore", vars, hooks)
	vars["RESTORE_URL"] = w.db
	mustFail(t, "RESTORE_URL is not empty", "backup-restore", vars, hooks)
}

func TestDrillNATSStoreLoss(t *testing.T) {
	t.Parallel()
	for _, lossy := range []bool{false, true} {
		monitor := "127.0.0.1:" + freePort(t)
		w := &world{t: t, db: dbtest.New(t), nats: natstest.Start(t, natstest.Options{Config: "http: " + monitor})}
		s := w.start(cheap, unlimited)
		vars := map[string]string{"BASE": s.base, "DATABASE_URL": w.db, "MONITOR": "http://" + monitor}
		hooks := map[string]func(){
			"LOSE": func() {
				w.nats.Stop()
				w.nats.DeleteStore()
				if lossy { // as if OUTBOX_RETENTION had been over
					dbtest.Exec(t, w.db, `DELETE FROM outbox WHERE sent_at IS NOT NULL`)
				}
			},
			"RETURN": w.nats.Restart,
		}
		if lossy {
			mustFail(t, "the stream has", "nats-store-loss", vars, hooks)
		} else {
			mustPass(t, "nats-store-loss", vars, hooks)
			w.checkEvents()
		}
	}
}

func TestDrillDatabasePromotion(t *testing.T) {
	t.Parallel()
	primary := dbtest.Start(t)
	standby := primary.Standby()
	var hosts []string
	for _, server := range []*dbtest.Server{primary, standby} {
		u, err := url.Parse(server.URL())
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, u.Host)
	}
	both, _ := url.Parse(primary.URL())
	both.Host = strings.Join(hosts, ",")
	both.RawQuery += "&target_session_attrs=read-write"
	w := &world{t: t, db: both.String(), nats: natstest.New(t)}
	t.Cleanup(func() { w.db = standby.URL(); w.checkEvents() })
	s := w.start(cheap, unlimited)
	vars := map[string]string{"BASE": s.base}
	mustPass(t, "database-promotion", vars, map[string]func(){"PROMOTE": func() {
		primary.Close()
		standby.Promote()
	}})
	vars["RECOVER"] = "3"
	mustFail(t, "not serving within 3 s", "database-promotion", vars, map[string]func(){"PROMOTE": standby.Stop})
	standby.Restart()
	s.waitReady()
}
