package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// patientDocker bounds what waits for images and containers on a busy machine.
const patientDocker = 10 * time.Minute

// project is docker-compose.yml in a copy of this checkout, under a name and an
// image tag of its own.
type project struct {
	t       *testing.T
	dir     string
	name    string
	image   string
	env     []string
	compose []string
	port    map[string]string
}

// TestContainers: from a fresh copy with nothing prepared, docker-compose.yml
// builds the image, comes up healthy and keeps what it has; three replicas behind
// nginx act as one; the image holds the binary and nothing else. Without a Docker
// engine nothing of this can run: then the last line of make test says so.
func TestContainers(t *testing.T) {
	if exec.Command("docker", "version").Run() != nil {
		t.Log("no Docker engine answers here: the image and docker-compose.yml were not tested")
		return
	}
	run(t, "../..", nil, "testdata/dev/images.sh", "up")
	t.Cleanup(func() { run(t, "../..", nil, "testdata/dev/images.sh", "down") })
	p := newProject(t)

	p.do("up", "-d")
	p.waitHealthy("identity-auth")
	s := p.client("PORT")
	who := s.register()
	tok := s.refresh(s.login(who).RefreshToken).tokens(t)
	keys := string(s.get("/.well-known/jwks.json").body)

	t.Run("events", func(t *testing.T) { p.checkEvents(t, who) })
	t.Run("locked down", func(t *testing.T) { p.checkContainers(t) })
	t.Run("image", func(t *testing.T) { p.checkImage(t) })

	// What was made once is kept, by a second `up` and by a new set of containers.
	p.do("up", "-d")
	p.do("down")
	p.do("up", "-d")
	p.waitHealthy("identity-auth")
	if got := string(s.get("/.well-known/jwks.json").body); got != keys {
		t.Errorf("after down and up the key set is\n%s\nwant\n%s", got, keys)
	}
	s.refresh(tok.RefreshToken).tokens(t)
	s.login(who)

	t.Run("replicas", func(t *testing.T) { p.checkReplicas(t, who) })
}

func newProject(t *testing.T) *project {
	t.Helper()
	p := &project{t: t, dir: filepath.Join(t.TempDir(), "identity-auth"), compose: []string{"docker-compose"}, port: map[string]string{}}
	if exec.Command("docker", "compose", "version").Run() == nil {
		p.compose = []string{"docker", "compose"}
	}
	id := newUUID()[:8]
	p.name, p.image = "identity-auth-e2e-"+id, "identity-auth:e2e-"+id
	p.env = []string{"COMPOSE_PROJECT_NAME=" + p.name, "VERSION=e2e-" + id, "COMMIT=" + id}
	for name, wanted := range map[string]string{"PORT": "8080", "POSTGRES_PORT": "5433", "NATS_PORT": "4222", "REPLICAS_PORT": "8090"} {
		p.port[name] = wanted
		if l, err := net.Listen("tcp", "127.0.0.1:"+wanted); err != nil {
			p.port[name] = freePort(t)
			p.env = append(p.env, name+"="+p.port[name])
		} else {
			l.Close()
		}
	}
	subnet := freeSubnet(t)
	p.env = append(p.env, "REPLICAS_SUBNET="+subnet.String(), "NGINX_ADDRESS="+strings.TrimSuffix(subnet.Addr().String(), "0")+"250")
	// As a clone under umask 077 would be: no container may count on being let in.
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "../..", nil, "bash", "-c", `tar --exclude=./.git --exclude=./.bin --exclude=./.run -c . | tar -x -C "$0" && chmod -R go= "$0"`, p.dir)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := p.command(append(p.compose, "--profile", "replicas", "logs", "--tail", "30")...).CombinedOutput()
			t.Logf("%s", out)
		}
		p.do("--profile", "replicas", "down", "-v", "--remove-orphans")
		exec.Command("docker", "rmi", p.image, p.image+"-again").Run()
		for _, kind := range []string{"container", "volume", "network"} {
			if left := docker(t, kind, "ls", "-q", "--filter", "label=com.docker.compose.project="+p.name); left != "" {
				t.Errorf("left behind, %s: %s", kind, left)
			}
		}
	})
	return p
}

// freeSubnet returns a subnet that no network of the engine and no interface has:
// others may run the same file on this machine.
func freeSubnet(t *testing.T) netip.Prefix {
	t.Helper()
	var taken []netip.Prefix
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			taken = append(taken, p)
		}
	}
	ids := strings.Fields(docker(t, "network", "ls", "-q"))
	for _, field := range strings.Fields(docker(t, append([]string{"network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{end}}"}, ids...)...)) {
		p, err := netip.ParsePrefix(field)
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, p)
	}
	// The engine takes the networks it picks itself from 172.16/12 and 192.168/16.
	for i := range 256 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 90, byte(i), 0}), 24)
		if !slices.ContainsFunc(taken, p.Overlaps) {
			return p
		}
	}
	t.Fatalf("no subnet is free: %v", taken)
	panic("unreachable")
}

func run(t *testing.T, dir string, env []string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patientDocker)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return strings.TrimSpace(stdout.String())
}

func docker(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, ".", nil, append([]string{"docker"}, args...)...)
}

func (p *project) command(args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Env = p.dir, append(os.Environ(), p.env...)
	return cmd
}

func (p *project) do(args ...string) string {
	p.t.Helper()
	return run(p.t, p.dir, p.env, append(slices.Clone(p.compose), args...)...)
}

// containers returns the ids of a service's containers.
func (p *project) containers(service string) []string {
	p.t.Helper()
	return strings.Fields(docker(p.t, "ps", "-aq", "--filter", "label=com.docker.compose.project="+p.name, "--filter", "label=com.docker.compose.service="+service))
}

func (p *project) waitHealthy(service string) {
	p.t.Helper()
	eventually(p.t, service+" healthy", patientDocker, func() bool {
		ids := p.containers(service)
		for _, id := range ids {
			if docker(p.t, "inspect", "-f", "{{.State.Health.Status}}", id) != "healthy" {
				time.Sleep(time.Second)
				return false
			}
		}
		return len(ids) > 0
	})
}

// client talks to a published port.
func (p *project) client(port string) *service {
	return &service{t: p.t, base: "http://127.0.0.1:" + p.port[port], client: &http.Client{Timeout: time.Minute}}
}

// checkEvents reads the stream as a consumer on the published port would.
func (p *project) checkEvents(t *testing.T, who person) {
	config := p.do("exec", "-T", "nats", "cat", "/config/nats.conf")
	found := regexp.MustCompile(`user: "consumer", password: "([0-9a-f]{48})"`).FindStringSubmatch(config)
	if found == nil {
		t.Fatal("nats.conf has no password for consumer")
	}
	nc, err := nats.Connect("nats://127.0.0.1:"+p.port["NATS_PORT"], nats.UserInfo("consumer", found[1]), nats.CustomInboxPrefix("_INBOX_consumer"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	consumer, err := js.CreateOrUpdateConsumer(ctx, "AUTH_EVENTS", jetstream.ConsumerConfig{Durable: "consumer", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	batch, err := consumer.Fetch(3, jetstream.FetchContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for msg := range batch.Messages() {
		var event struct {
			Type string `json:"event_type"`
			User string `json:"aggregate_id"`
		}
		if err := json.Unmarshal(msg.Data(), &event); err != nil || event.User != who.UserID {
			t.Errorf("not an event of the account: %s", msg.Data())
		}
		got = append(got, event.Type)
		msg.Ack()
	}
	if want := []string{"auth.user.registered", "auth.user.logged_in", "auth.token.refreshed"}; !slices.Equal(got, want) {
		t.Errorf("got events %q (%v), want %q", got, batch.Error(), want)
	}
	var varz struct {
		JetStream struct {
			Config struct {
				SyncAlways bool   `json:"sync_always"`
				StoreDir   string `json:"store_dir"`
			}
		}
	}
	answer := p.do("exec", "-T", "nats", "wget", "-q", "-O", "-", "http://127.0.0.1:8222/varz")
	if err := json.Unmarshal([]byte(answer), &varz); err != nil {
		t.Fatal(err)
	}
	if c := varz.JetStream.Config; !c.SyncAlways || !strings.HasPrefix(c.StoreDir, "/data") {
		t.Errorf("got JetStream %+v, want sync_always and its store in /data", c)
	}
	if got := p.do("exec", "-T", "postgres", "psql", "-U", "postgres", "-Atc", "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = 'identity_auth'"); got != "f|f|f" {
		t.Errorf("rights of the service's role: got %s, want none (f|f|f)", got)
	}
}

// checkContainers: what docker-compose.yml promises of every container.
func (p *project) checkContainers(t *testing.T) {
	wantPorts := map[string]string{"identity-auth": p.port["PORT"], "postgres": p.port["POSTGRES_PORT"], "nats": p.port["NATS_PORT"]}
	for _, service := range []string{"identity-auth", "postgres", "nats", "prepare", "keygen"} {
		ids := p.containers(service)
		if len(ids) != 1 {
			t.Fatalf("%s: %d containers, want 1", service, len(ids))
		}
		var c []struct {
			State  struct{ ExitCode int }
			Config struct{ User string }
			Mounts []struct{ Type, Name string }

			HostConfig struct {
				ReadonlyRootfs       bool
				CapDrop              []string
				SecurityOpt          []string
				Memory, PidsLimit    int64
				LogConfig            struct{ Config map[string]string }
				RestartPolicy        struct{ Name string }
				PortBindings         map[string][]struct{ HostIp, HostPort string }
				Privileged           bool
				NetworkMode, IpcMode string
			}
		}
		if err := json.Unmarshal([]byte(docker(t, "inspect", ids[0])), &c); err != nil {
			t.Fatal(err)
		}
		h, once := c[0].HostConfig, service == "prepare" || service == "keygen"
		for promise, kept := range map[string]bool{
			"read-only":         h.ReadonlyRootfs,
			"no capabilities":   slices.Equal(h.CapDrop, []string{"ALL"}),
			"no new privileges": slices.Contains(h.SecurityOpt, "no-new-privileges:true"),
			"memory limit":      h.Memory > 0,
			"process limit":     h.PidsLimit > 0,
			"bounded logs":      h.LogConfig.Config["max-size"] != "" && h.LogConfig.Config["max-file"] != "",
			"not root":          service == "prepare" || c[0].Config.User != "" && !strings.HasPrefix(c[0].Config.User, "0"),
			"restarted":         once || h.RestartPolicy.Name == "unless-stopped",
			"run once":          !once || (h.RestartPolicy.Name == "no" || h.RestartPolicy.Name == "") && c[0].State.ExitCode == 0,
			"no network":        !once || h.NetworkMode == "none",
		} {
			if !kept {
				t.Errorf("%s: not %s: %+v", service, promise, c[0])
			}
		}
		if service == "identity-auth" && h.Memory < 3*64<<20 {
			t.Errorf("identity-auth: %d bytes of memory are less than two hashes and 64 MiB", h.Memory)
		}
		var published []string
		for _, bindings := range h.PortBindings {
			for _, b := range bindings {
				published = append(published, b.HostIp+":"+b.HostPort)
			}
		}
		var want []string
		if port := wantPorts[service]; port != "" {
			want = []string{"127.0.0.1:" + port}
		}
		if !slices.Equal(published, want) {
			t.Errorf("%s: published on %q, want %q", service, published, want)
		}
	}
}

// checkImage builds the image again, without the cache, and looks into it.
func (p *project) checkImage(t *testing.T) {
	again := p.image + "-again"
	run(t, p.dir, append(p.env, "DOCKER_BUILDKIT=0"), "docker", "build", "-q", "--no-cache",
		"--build-arg", "VERSION="+strings.TrimPrefix(p.image, "identity-auth:"), "--build-arg", "COMMIT="+strings.TrimPrefix(p.image, "identity-auth:e2e-"), "-t", again, ".")
	first, second := imageFiles(t, p.image), imageFiles(t, again)
	if !bytes.Equal(first["identity-auth"], second["identity-auth"]) {
		t.Error("two builds of the same sources differ")
	}
	dockerfile, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	base := regexp.MustCompile(`(?m)^ARG BASE_IMAGE=(.+)$`).FindSubmatch(dockerfile)
	for name := range imageFiles(t, string(base[1])) {
		delete(first, name)
	}
	if len(first) != 1 || first["identity-auth"] == nil {
		t.Errorf("beside the base: got %q, want identity-auth alone", slices.Collect(maps.Keys(first)))
	}
	binary, err := elf.NewFile(bytes.NewReader(second["identity-auth"]))
	if err != nil {
		t.Fatal(err)
	}
	if libs, _ := binary.ImportedLibraries(); len(libs) > 0 || slices.ContainsFunc(binary.Progs, func(prog *elf.Prog) bool { return prog.Type == elf.PT_INTERP }) {
		t.Errorf("the binary is not static: it needs %q", libs)
	}

	var image []struct {
		Size   int64
		RootFS struct{ Layers []string }
		Config struct {
			User        string
			Entrypoint  []string
			Cmd         []string
			Healthcheck struct{ Test []string }
			Labels      map[string]string
		}
	}
	if err := json.Unmarshal([]byte(docker(t, "image", "inspect", p.image, again)), &image); err != nil {
		t.Fatal(err)
	}
	c := image[0].Config
	if c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/identity-auth"}) || len(c.Cmd) > 0 ||
		!slices.Equal(c.Healthcheck.Test, []string{"CMD", "/identity-auth", "healthcheck"}) ||
		c.Labels["org.opencontainers.image.revision"] != strings.TrimPrefix(p.image, "identity-auth:e2e-") {
		t.Errorf("got image configuration %+v", c)
	}
	if image[0].Size >= 25e6 {
		t.Errorf("the image has %d bytes, want less than 25 MB", image[0].Size)
	}
	if !slices.Equal(image[0].RootFS.Layers, image[1].RootFS.Layers) {
		t.Errorf("two builds have different layers: %q, %q", image[0].RootFS.Layers, image[1].RootFS.Layers)
	}
	t.Logf("the image has %.1f MB", float64(image[0].Size)/1e6)

	tag := strings.TrimPrefix(p.image, "identity-auth:")
	out := docker(t, "run", "--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none", p.image, "version")
	if want := "identity-auth " + tag + " commit " + strings.TrimPrefix(tag, "e2e-") + " go"; !strings.HasPrefix(out, want) {
		t.Errorf("version: got %q, want %q...", out, want)
	}
}

// imageFiles returns the files of an image by name; only the binary is kept.
func imageFiles(t *testing.T, image string) map[string][]byte {
	t.Helper()
	id := docker(t, "create", "--network", "none", image, "x")
	defer docker(t, "rm", id)
	cmd := exec.Command("docker", "export", id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for archive := tar.NewReader(out); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Name == "identity-auth" {
			if files[header.Name], err = io.ReadAll(archive); err != nil {
				t.Fatal(err)
			}
			if header.Uid != 0 || header.Mode&0o7777 != 0o755 {
				t.Errorf("%s: owner %d, mode %o, want root's and 755", header.Name, header.Uid, header.Mode)
			}
		} else {
			files[header.Name] = []byte{}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return files
}

// checkReplicas: three replicas behind nginx are one service, and know the client
// that nginx saw, whatever the client says of itself.
func (p *project) checkReplicas(t *testing.T, who person) {
	p.do("--profile", "replicas", "up", "-d")
	p.waitHealthy("replica")
	p.waitHealthy("nginx")
	s := p.client("REPLICAS_PORT")
	s.t = t
	replicas := p.containers("replica")
	if len(replicas) != 3 {
		t.Fatalf("%d replicas, want 3", len(replicas))
	}

	// The account logs in on any of them, and its limit counts over all of them.
	fresh := s.register()
	s.login(who)
	results := map[int]int{}
	for range 20 {
		results[s.do("POST", "/api/auth/login", fresh.loginBody(fresh.Password)).status]++
	}
	// The limit refills by 10 a minute: on a slow machine a few more are let through.
	if results[200] < 10 || results[200] > 15 || results[200]+results[429] != 20 {
		t.Errorf("20 logins of one account gave %v, want about 10 times 200 and else 429", results)
	}

	const claimed = "203.0.113.7"
	network := p.name + "_replicas"
	gateway := docker(t, "network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", network)
	subnet := docker(t, "network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", network)
	if gateway == "" {
		gateway = strings.TrimSuffix(subnet, "0/24") + "1"
	}
	inside := strings.TrimSuffix(subnet, "0/24") + "77"
	mangled := map[string]string{"refresh_token": "iar_mangled"}
	for range 60 { // so that each replica gets one, all but certainly
		if a := s.post("/api/auth/refresh", mangled, "X-Forwarded-For", claimed); a.status != 401 && a.status != 429 {
			t.Fatalf("refresh: got %d %s", a.status, a.body)
		}
	}
	nginx := docker(t, "inspect", "-f", `{{(index .NetworkSettings.Networks "`+network+`").IPAddress}}`, p.containers("nginx")[0])
	docker(t, "run", "--rm", "--network", network, "--ip", inside, "--entrypoint", "curl", docker(t, "inspect", "-f", "{{.Config.Image}}", p.containers("nginx")[0]),
		"-sS", "-H", "Content-Type: application/json", "-d", string(toJSON(mangled)), "http://"+nginx+":8080/api/auth/refresh")
	seen := map[string]int{}
	for _, id := range replicas {
		served := 0
		for line := range strings.Lines(docker(t, "logs", id)) {
			var m struct {
				Event, Result string
				ClientIP      string `json:"client_ip"`
			}
			if json.Unmarshal([]byte(line), &m) == nil && m.Event == "auth.refresh" {
				seen[m.ClientIP]++
				served++
			}
		}
		if served == 0 {
			t.Errorf("replica %s has served nothing", id)
		}
	}
	if len(seen) != 2 || seen[gateway] == 0 || seen[inside] != 1 {
		t.Errorf("got clients %v, want those that nginx saw: %s, and %s once", seen, gateway, inside)
	}

	// One replica less changes nothing for clients.
	docker(t, "kill", "-s", "KILL", replicas[0])
	for i := range 10 {
		if a := s.get("/.well-known/jwks.json"); a.status != 200 {
			t.Errorf("request %d after a replica was killed: %d", i, a.status)
		}
	}
}
