package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.yaml.in/yaml/v4"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

const (
	rulesFile     = "../../deploy/prometheus/alerts.yaml"
	ruleTestsFile = "../../deploy/prometheus/alerts_test.yaml"
	dashboardFile = "../../deploy/grafana/dashboard.json"
)

// program finds one of Prometheus' programs: on PATH, or where
// testdata/dev/deps.sh puts what it gets.
func program(t *testing.T, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	path, err := filepath.Abs(filepath.Join("../../.bin", name))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%s not found: run `testdata/dev/deps.sh prometheus`", name)
	}
	return path
}

// rule is one rule of the file that operators load.
type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

func readRules(t *testing.T) (all []rule) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct{ Rules []rule }
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatalf("%s has no rules", rulesFile)
	}
	return all
}

// alertNames are the alerts as they fire: one for each objective where the
// alert is for all of them.
func alertNames(t *testing.T) (names []string) {
	t.Helper()
	var objectives []string
	for _, r := range readRules(t) {
		if slo := r.Labels["slo"]; slo != "" && !slices.Contains(objectives, slo) {
			objectives = append(objectives, slo)
		}
	}
	for _, r := range readRules(t) {
		switch {
		case r.Alert == "":
		case strings.Contains(r.Expr, "auth:slo_burn"):
			for _, slo := range objectives {
				names = append(names, r.Alert+" "+slo)
			}
		default:
			names = append(names, r.Alert)
		}
	}
	return names
}

func TestPromtool(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"check", "rules", rulesFile}, {"test", "rules", ruleTestsFile}} {
		if out, err := exec.Command(program(t, "promtool"), args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	// Each alert fires in some case: a case that expects nothing proves nothing.
	text, err := os.ReadFile(ruleTestsFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Tests []struct {
			Exprs []struct {
				Samples []struct{ Labels string } `yaml:"exp_samples"`
			} `yaml:"promql_expr_test"`
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	var fired []string
	for _, test := range file.Tests {
		for _, e := range test.Exprs {
			for _, s := range e.Samples {
				if found := regexp.MustCompile(`alertname="(\w+)"`).FindStringSubmatch(s.Labels); found != nil {
					fired = append(fired, found[1])
				}
			}
		}
	}
	for _, r := range readRules(t) {
		if r.Alert != "" && !slices.Contains(fired, r.Alert) {
			t.Errorf("%s: %s fires in no case", ruleTestsFile, r.Alert)
		}
	}
}

// TestAlertTexts: whoever is woken by an alert is told what it is, where to
// look, and which page to open. Each line of the runbook's list has its alert.
func TestAlertTexts(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../RUNBOOK.md")
	if err != nil {
		t.Fatal(err)
	}
	runbook := string(text)
	for _, r := range readRules(t) {
		if r.Alert == "" {
			continue
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || !slices.Contains([]string{"page", "ticket"}, r.Labels["severity"]) {
			t.Errorf("%s: want a summary, a description and a severity, page or ticket", r.Alert)
		}
		page := regexp.MustCompile(`^RUNBOOK\.md, section (\d+\.\d+)$`).FindStringSubmatch(r.Annotations["runbook"])
		if page == nil || !strings.Contains(runbook, "\n## "+page[1]+" ") {
			t.Errorf("%s: runbook %q: RUNBOOK.md has no such section", r.Alert, r.Annotations["runbook"])
			continue
		}
		_, section, _ := strings.Cut(runbook, "\n## "+page[1]+" ")
		section, _, _ = strings.Cut(section, "\n## ")
		if !strings.Contains(section, r.Alert) && !strings.Contains(section, strings.TrimRight(r.Alert, "0123456789")) {
			t.Errorf("%s: section %s of RUNBOOK.md does not name it", r.Alert, page[1])
		}
	}
	_, monitoring, _ := strings.Cut(runbook, "\n# 4. Monitoring and metrics\n")
	monitoring, _, _ = strings.Cut(monitoring, "\n# ")
	for _, row := range []struct{ line, alert, expr string }{
		{`auth_login_total{result="failure"}`, "IdentityAuthLoginFailures", `auth_login_total{result="failure"}`},
		{`auth_register_total{result="hash_busy"}`, "IdentityAuthHashBusy", `auth_register_total{result="hash_busy"}`},
		{`auth_refresh_total{result="replay"}`, "IdentityAuthRefreshReplay", `auth_refresh_total{result="replay"}`},
		{"`auth_http_request_duration_seconds` p95/p99 > 500ms", "IdentityAuthSlowP95", "histogram_quantile(0.95"},
		{"`auth_http_request_duration_seconds` p95/p99 > 500ms", "IdentityAuthSlowP99", "histogram_quantile(0.99"},
		{`auth_dependency_up{dep="db"} == 0`, "IdentityAuthDatabaseDown", `auth_dependency_up{dep="db"} == 0`},
		{`auth_dependency_up{dep="nats"} == 0`, "IdentityAuthNATSDown", `auth_dependency_up{dep="nats"} == 0`},
	} {
		if !strings.Contains(monitoring, row.line) {
			t.Errorf("RUNBOOK.md, section 4: %s is missing", row.line)
		}
		if !slices.ContainsFunc(readRules(t), func(r rule) bool { return r.Alert == row.alert && strings.Contains(r.Expr, row.expr) }) {
			t.Errorf("%s: no alert on it", row.line)
		}
	}
	for _, r := range readRules(t) {
		if r.Alert != "" && !strings.Contains(monitoring, r.Alert) {
			t.Errorf("RUNBOOK.md, section 4: %s is missing", r.Alert)
		}
	}
}

// shortened is the rules file with every duration divided by 60, so that an
// hour passes in a minute: in for and interval, and in the windows of ranges.
// Nothing else of it is changed.
func shortened(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	durations := regexp.MustCompile(`(?m)(\[|^ +for: |^ +interval: )(\d+)([smhd])\b`)
	unit := map[string]int{"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
	changed := 0
	short := durations.ReplaceAllStringFunc(string(text), func(found string) string {
		parts := durations.FindStringSubmatch(found)
		n, _ := strconv.Atoi(parts[2])
		changed++
		return fmt.Sprintf("%s%dms", parts[1], n*unit[parts[3]]/60)
	})
	if changed < 40 {
		t.Fatalf("got %d durations in %s, want all of them", changed, rulesFile)
	}
	return short
}

// prometheus is a server that scrapes the targets and evaluates the rules.
type prometheus struct {
	t       *testing.T
	base    string
	targets string // a file of service discovery, which may change

	mu    sync.Mutex
	fired map[string]bool
}

// startPrometheus scrapes services as the job identity-auth twice a second.
func startPrometheus(t *testing.T, services ...*service) *prometheus {
	t.Helper()
	dir, port := t.TempDir(), freePort(t)
	p := &prometheus{t: t, base: "http://127.0.0.1:" + port, targets: filepath.Join(dir, "targets.json"), fired: map[string]bool{}}
	config := `
global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: identity-auth
    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]
`
	for name, text := range map[string]string{"prometheus.yaml": config, "rules.yaml": shortened(t)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.scrape(services...)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t, "prometheus"), "--config.file="+filepath.Join(dir, "prometheus.yaml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:"+port, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		log.Close()
		if text, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("Prometheus' log:\n%s", text)
		}
	})
	eventually(t, "Prometheus is ready", time.Minute, func() bool {
		resp, err := http.Get(p.base + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	return p
}

// scrape replaces what is scraped.
func (p *prometheus) scrape(services ...*service) {
	p.t.Helper()
	groups := []map[string][]string{}
	for _, s := range services {
		groups = append(groups, map[string][]string{"targets": {strings.TrimPrefix(s.base, "http://")}})
	}
	// Renamed into place: half a file would be an error.
	if err := os.WriteFile(p.targets+".new", toJSON(groups), 0o600); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Rename(p.targets+".new", p.targets); err != nil {
		p.t.Fatal(err)
	}
}

// ask decodes the data of an answer of Prometheus' HTTP API.
func (p *prometheus) ask(path string, data any) error {
	resp, err := http.Get(p.base + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s", answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}

// firing remembers, and returns, what fires now, as alertNames spells it.
func (p *prometheus) firing() (now []string) {
	p.t.Helper()
	var data struct {
		Alerts []struct {
			Labels map[string]string
			State  string
		}
	}
	if err := p.ask("/api/v1/alerts", &data); err != nil {
		p.t.Errorf("asking for alerts: %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range data.Alerts {
		if a.State == "firing" {
			name := strings.TrimSpace(a.Labels["alertname"] + " " + a.Labels["slo"])
			now = append(now, name)
			p.fired[name] = true
		}
	}
	return now
}

// fires does something again and again until each of the alerts has fired.
func (p *prometheus) fires(again func(), alerts ...string) {
	p.t.Helper()
	begun := time.Now()
	eventually(p.t, strings.Join(alerts, ", ")+" fire", 4*time.Minute, func() bool {
		if again != nil {
			again()
		}
		p.firing()
		p.mu.Lock()
		defer p.mu.Unlock()
		return !slices.ContainsFunc(alerts, func(name string) bool { return !p.fired[name] })
	})
	p.t.Logf("after %v: %s", time.Since(begun).Round(time.Second), strings.Join(alerts, ", "))
}

// burning are the alerts of an objective.
func burning(slo string) []string {
	return []string{"IdentityAuthBudgetBurnsFast " + slo, "IdentityAuthBudgetBurns " + slo, "IdentityAuthBudgetBurnsSlowly " + slo}
}

// TestEveryAlertFires makes each alert of the file fire, by the real cause, with
// a real Prometheus that evaluates the file with its durations shortened.
func TestEveryAlertFires(t *testing.T) {
	var mu sync.Mutex
	fired := map[string]bool{}
	remember := func(p *prometheus) {
		mu.Lock()
		defer mu.Unlock()
		for name := range p.fired {
			fired[name] = true
		}
	}
	t.Run("causes", func(t *testing.T) {
		t.Run("attacks and outages", func(t *testing.T) {
			t.Parallel()
			p := attacksAndOutages(t)
			remember(p)
		})
		t.Run("slow", func(t *testing.T) {
			t.Parallel()
			remember(slowAnswers(t))
		})
	})
	for _, name := range alertNames(t) {
		if !fired[name] {
			t.Errorf("%s did not fire", name)
		}
	}
}

func attacksAndOutages(t *testing.T) *prometheus {
	pg := dbtest.Start(t)
	w := &world{t: t, db: pg.URL(), nats: natstest.New(t)}
	s := w.startPlain(cheap, unlimited, env{"MAX_CONCURRENT_HASHES": "1", "HASH_ACQUIRE_TIMEOUT": "1ms", "LOCKOUT_THRESHOLD": "1"})
	p := startPrometheus(t, s)

	// All is well: nothing fires, and the dashboard shows something everywhere.
	ada := s.register()
	token := s.login(ada).RefreshToken
	checkDashboard(t, p)
	for until := time.Now().Add(8 * time.Second); time.Now().Before(until); time.Sleep(500 * time.Millisecond) {
		token = s.refresh(token).tokens(t).RefreshToken
		if now := p.firing(); len(now) > 0 {
			t.Fatalf("all is well, and these fire: %q", now)
		}
	}

	old := token
	s.refresh(token)
	p.fires(func() { s.refresh(old) }, "IdentityAuthRefreshReplay")

	// An event waits from here on.
	w.nats.Stop()
	grace := s.register()
	token = s.login(grace).RefreshToken
	p.fires(nil, "IdentityAuthNATSDown")
	// Each a wrong password for an e-mail of its own, which it locks.
	p.fires(func() { s.do("POST", loginPath, newPerson().loginBody("wrong battery staple horse")) }, "IdentityAuthLoginFailures", "IdentityAuthLockouts")
	p.fires(func() {
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() { s.try("POST", registerPath, toJSON(newPerson())) })
		}
		all.Wait()
	}, "IdentityAuthHashBusy")
	p.fires(nil, "IdentityAuthOutboxOld")

	pg.Stop()
	p.fires(func() { s.refresh(token) }, append(burning("availability"), "IdentityAuthDatabaseDown")...)
	pg.Restart()
	w.nats.Restart()
	s.waitReady()

	if code := s.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	p.fires(nil, "IdentityAuthDown")
	p.scrape()
	p.fires(nil, "IdentityAuthAbsent")
	return p
}

// slowAnswers has somebody lock the table of sessions again and again, for longer
// than every objective: each login and each refresh waits for that.
func slowAnswers(t *testing.T) *prometheus {
	w := newWorld(t)
	s := w.startPlain(cheap, unlimited, env{"DATABASE_MAX_CONNECTIONS": "8"})
	var people []person
	var sessions []string
	for range 6 {
		one := s.register()
		people, sessions = append(people, one), append(sessions, s.login(one).RefreshToken)
	}
	p := startPrometheus(t, s)

	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	locker, err := pgx.Connect(ctx, w.db)
	if err != nil {
		t.Fatal(err)
	}
	all.Go(func() {
		defer locker.Close(context.WithoutCancel(ctx))
		// On one connection: the next lock is asked for before a client's next request is there.
		for ctx.Err() == nil {
			_, err := locker.Exec(ctx, `DO $$ BEGIN LOCK TABLE identity_auth.sessions IN EXCLUSIVE MODE; PERFORM pg_sleep(1.4); END $$`)
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range people {
		all.Go(func() {
			for ctx.Err() == nil {
				s.try("POST", loginPath, people[i].loginBody(password))
			}
		})
		all.Go(func() {
			for ctx.Err() == nil {
				var next tokens
				if a, err := s.try("POST", refreshPath, refreshBody(sessions[i])); err == nil && json.Unmarshal(a.body, &next) == nil && next.RefreshToken != "" {
					sessions[i] = next.RefreshToken
				}
			}
		})
	}
	p.fires(nil, slices.Concat([]string{"IdentityAuthSlowP95", "IdentityAuthSlowP99", "IdentityAuthPoolExhausted"},
		burning("login_p95"), burning("login_p99"), burning("refresh_p95"), burning("refresh_p99"))...)
	return p
}

// checkDashboard asks Prometheus what each panel would: every query has an
// answer.
func checkDashboard(t *testing.T, p *prometheus) {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Type    string
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
		Templating struct{ List []struct{ Name string } }
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	variables := strings.NewReplacer("$job", "identity-auth", "$instance", ".*", "$__rate_interval", "1m")
	ids, queries, metrics := map[int]bool{}, 0, map[string]bool{}
	for _, panel := range dashboard.Panels {
		if ids[panel.ID] || panel.GridPos.X+panel.GridPos.W > 24 || panel.Title == "" {
			t.Errorf("panel %d %q: its id is taken, it reaches over the edge, or it has no title", panel.ID, panel.Title)
		}
		ids[panel.ID] = true
		if (panel.Type == "row") != (len(panel.Targets) == 0) {
			t.Errorf("panel %q has %d queries", panel.Title, len(panel.Targets))
		}
		for _, target := range panel.Targets {
			queries++
			for _, name := range regexp.MustCompile(`auth_\w+`).FindAllString(target.Expr, -1) {
				metrics[regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(name, "")] = true
			}
			query := variables.Replace(target.Expr)
			if strings.Contains(query, "$") {
				t.Errorf("panel %q: unknown variable in %s", panel.Title, target.Expr)
				continue
			}
			var last string
			var result struct{ Result []json.RawMessage }
			eventually(t, fmt.Sprintf("panel %q has a series for %s", panel.Title, query), time.Minute, func() bool {
				if err := p.ask("/api/v1/query?query="+url.QueryEscape(query), &result); err != nil && err.Error() != last {
					last = err.Error()
					t.Errorf("panel %q: %s: %v", panel.Title, query, err)
				}
				return len(result.Result) > 0 || last != ""
			})
		}
	}
	if queries < 30 {
		t.Errorf("got %d queries in %s, want all of them", queries, dashboardFile)
	}
	// The service has nothing to tell that is not shown.
	var names []string
	if err := p.ask("/api/v1/label/__name__/values", &names); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		name = regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(name, "")
		if strings.HasPrefix(name, "auth_") && !metrics[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestObjectivesAreBuckets: the bounds that the rules count by are bounds of the
// histogram, or they would count nothing.
func TestObjectivesAreBuckets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap))
	scraped := string(s.get("/metrics").body)
	checked := 0
	for _, r := range readRules(t) {
		for _, found := range regexp.MustCompile(`route="([^"]+)",.*le="([^"]+)"`).FindAllStringSubmatch(r.Expr, -1) {
			checked++
			if !regexp.MustCompile(`auth_http_request_duration_seconds_bucket\{method="POST",route="` + found[1] + `",status="200",le="` + regexp.QuoteMeta(found[2]) + `"\}`).MatchString(scraped) {
				t.Errorf("%s: the histogram has no bound %s", found[1], found[2])
			}
		}
	}
	if checked != 4 {
		t.Errorf("got %d bounds in %s, want 4", checked, rulesFile)
	}
}
