package e2e

import (
	"bufio"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"
)

const (
	unitFile       = "../../deploy/systemd/identity-auth.service"
	unitEnvFile    = "../../deploy/systemd/identity-auth.env.example"
	deploymentFile = "../../deploy/kubernetes/deployment.yaml"
)

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// directives are the lines KEY=VALUE of a unit or an environment file.
func directives(text string) (lines [][2]string) {
	scan := bufio.NewScanner(strings.NewReader(text))
	for scan.Scan() {
		if key, value, found := strings.Cut(scan.Text(), "="); found && !strings.HasPrefix(key, "#") {
			lines = append(lines, [2]string{key, value})
		}
	}
	return lines
}

// unitSettings is what the unit gives the service: its own variables and those
// of the environment file, and where its credentials come from, by their name.
func unitSettings(t *testing.T) (settings env, credentials map[string]string) {
	t.Helper()
	settings, credentials = env{}, map[string]string{}
	for _, line := range directives(readText(t, unitFile)) {
		switch line[0] {
		case "Environment":
			name, value, _ := strings.Cut(line[1], "=")
			settings[name] = value
		case "LoadCredential":
			name, path, _ := strings.Cut(line[1], ":")
			credentials[name] = path
		}
	}
	for _, line := range directives(readText(t, unitEnvFile)) {
		settings[line[0]] = line[1]
	}
	return settings, credentials
}

func deploymentSettings(t *testing.T) env {
	t.Helper()
	settings := env{}
	for _, document := range strings.Split(readText(t, deploymentFile), "\n---\n") {
		var object struct {
			Kind string
			Spec struct {
				Template struct {
					Spec struct {
						Containers []struct {
							Env []struct{ Name, Value string }
						}
					}
				}
			}
		}
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatal(err)
		}
		if object.Kind == "Deployment" {
			for _, v := range object.Spec.Template.Spec.Containers[0].Env {
				settings[v.Name] = v.Value
			}
		}
	}
	return settings
}

// TestDeployedSettings starts the service with just what the deployment, and
// what the unit, set: no name is misspelt and no value refused. Only addresses
// and the folders of secrets are this machine's.
func TestDeployedSettings(t *testing.T) {
	t.Parallel()
	readme := readText(t, "../../README.md")
	unit, credentials := unitSettings(t)
	for name, settings := range map[string]env{"deployment": deploymentSettings(t), "unit": unit} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			dir := t.TempDir()
			keys := keyPair()
			secrets := map[string]string{
				"database-url": w.db, "nats-url": w.nats.URL(),
				"register-token": strings.Repeat("r", 32), "admin-token": strings.Repeat("a", 32),
				"private.pem": keys.private, "public.pem": keys.public, "kid": "test-1\n",
				"prev.pem": "", "prev.kid": "", "next.pem": "", "next.kid": "",
			}
			c := env{}
			for variable, value := range settings {
				known := strings.Contains(readme, "\n| "+variable+" |")
				if base, isFile := strings.CutSuffix(variable, "_FILE"); isFile && !known {
					known = strings.Contains(readme, "\n| "+base+" |")
					file := filepath.Base(value)
					text, made := secrets[file]
					if !made || name == "unit" && strings.HasPrefix(value, "%d/") && credentials[file] == "" {
						t.Errorf("%s: nothing makes the file %s", variable, value)
					}
					value = filepath.Join(dir, file)
					if err := os.WriteFile(value, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if !known {
					t.Errorf("%s is no variable of README.md", variable)
				}
				c[variable] = value
			}
			admin := "127.0.0.1:" + freePort(t)
			c["HOST"], c["PORT"], c["ADMIN_ADDR"] = "127.0.0.1", freePort(t), admin
			c["SHUTDOWN_DELAY"] = "" // waited for elsewhere
			s := w.launch(plainBinary, c)
			s.waitReady()
			wantCode(t, "/metrics on PORT", s.get("/metrics"), 404, "not_found")
			resp, err := http.Get("http://" + admin + "/metrics")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 200 {
				t.Errorf("/metrics on ADMIN_ADDR: got %d, want 200", resp.StatusCode)
			}
			wantCode(t, "register without the token", s.post(registerPath, newPerson()), 401, "unauthorized")
			wantCode(t, "register", s.post(registerPath, newPerson(), "Authorization", "Bearer "+secrets["register-token"]), 201, "")
		})
	}
}

// systemdAnalyze runs it on the unit, with its text changed, as installed beside
// a binary.
func systemdAnalyze(t *testing.T, change func(string) string, args ...string) (output string, err error) {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Fatal("systemd-analyze not found: run `testdata/dev/deps.sh systemd`")
	}
	binary, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "identity-auth.service")
	text := change(strings.ReplaceAll(readText(t, unitFile), "/usr/local/bin/identity-auth", binary))
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", append(args, path)...).CombinedOutput()
	return string(out), err
}

// TestUnit asks systemd what it thinks of the unit.
func TestUnit(t *testing.T) {
	t.Parallel()
	as := func(text string) string { return text }
	if out, err := systemdAnalyze(t, as, "verify", "--man=no"); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, row := range [][2]string{
		{"ProtectSystem=strict", "ProtectSystems=strict"},
		{"SystemCallFilter=@system-service", "SystemCallFilter=@system-services"},
		{"TimeoutStopSec=45", "TimeoutStopSec=45 apples"},
	} {
		out, _ := systemdAnalyze(t, func(text string) string { return strings.Replace(text, row[0], row[1], 1) }, "verify", "--man=no")
		if out == "" {
			t.Errorf("systemd-analyze verify says nothing of %s", row[1])
		}
	}
	// In tenths, 0 is best; a unit without any sandbox has 96.
	const exposure = "--threshold=15"
	if out, err := systemdAnalyze(t, as, "security", "--offline=true", "--no-pager", exposure); err != nil {
		t.Errorf("systemd-analyze security %s: %v\n%s", exposure, err, out)
	}
	loose := func(text string) string { return strings.Replace(text, "\nCapabilityBoundingSet=\n", "\n", 1) }
	if _, err := systemdAnalyze(t, loose, "security", "--offline=true", "--no-pager", exposure); err == nil {
		t.Errorf("systemd-analyze security %s accepts all capabilities", exposure)
	}
}

// TestUnitNumbersAddUp: the unit's numbers that follow from the service's.
func TestUnitNumbersAddUp(t *testing.T) {
	t.Parallel()
	unit := map[string]string{}
	for _, line := range directives(readText(t, unitFile)) {
		unit[line[0]] = line[1]
	}
	settings, _ := unitSettings(t)
	wait := 5 * time.Second // for the outbox
	for _, name := range []string{"SHUTDOWN_DELAY", "SHUTDOWN_TIMEOUT"} {
		value := settings[name]
		if value == "" { // the default, from the table
			row := regexp.MustCompile(`\n\| ` + name + " \\| `([^`]+)`").FindStringSubmatch(readText(t, "../../README.md"))
			if row == nil {
				t.Fatalf("README.md has no default for %s", name)
			}
			value = row[1]
		}
		d, err := time.ParseDuration(value)
		if err != nil {
			t.Fatal(err)
		}
		wait += d
	}
	if stop, err := strconv.Atoi(unit["TimeoutStopSec"]); err != nil || time.Duration(stop)*time.Second <= wait {
		t.Errorf("TimeoutStopSec: got %s, want more than %v", unit["TimeoutStopSec"], wait)
	}
	slots, err := strconv.Atoi(settings["MAX_CONCURRENT_HASHES"])
	limit, lerr := strconv.Atoi(strings.TrimSuffix(unit["MemoryMax"], "M"))
	if err != nil || lerr != nil || limit*4 < (slots*64+64)*5 {
		t.Errorf("MemoryMax: got %s, want %d MiB and a quarter more", unit["MemoryMax"], slots*64+64)
	}
	if !slices.Contains(directives(readText(t, unitFile)), [2]string{"RestartPreventExitStatus", "2"}) {
		t.Error("a wrong configuration is started again and again")
	}
}
