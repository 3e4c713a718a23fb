package auth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/jwt"
)

// The tests below hold README.md, RUNBOOK.md and openapi.json to the code.

// paperTable returns the rows of the first table below a heading.
func paperTable(t *testing.T, file, heading string) [][]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", file))
	if err != nil {
		t.Fatal(err)
	}
	_, below, found := strings.Cut(string(text), "\n"+heading+"\n")
	if !found {
		t.Fatalf("%s has no heading %q", file, heading)
	}
	var rows [][]string
	for line := range strings.Lines(below) {
		if !strings.HasPrefix(line, "|") {
			if len(rows) > 0 {
				break
			}
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	if len(rows) < 3 {
		t.Fatalf("%s, %q: no table", file, heading)
	}
	return rows[2:] // without its head
}

// column is one column of a table, without backticks.
func column(rows [][]string, i int) []string {
	var cells []string
	for _, row := range rows {
		cells = append(cells, strings.Trim(row[i], "`"))
	}
	return cells
}

// sameSet compares two lists in any order, and wants no repetition in got.
func sameSet(t *testing.T, what string, got, want []string) {
	t.Helper()
	got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
	for _, name := range got {
		if !slices.Contains(want, name) {
			t.Errorf("%s: %s stands there, but not in the code", what, name)
		}
	}
	for _, name := range want {
		if !slices.Contains(got, name) {
			t.Errorf("%s: %s is missing", what, name)
		}
	}
	if len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("%s: a row stands there twice: %v", what, got)
	}
}

func TestReadmeConfiguration(t *testing.T) {
	rows := paperTable(t, "README.md", "## Configuration")
	var names []string
	byName := map[string]variable{}
	for _, v := range variables(&Config{pems: map[string]string{}}) {
		names = append(names, v.Name)
		byName[v.Name] = v
	}
	if got := column(rows, 0); !slices.Equal(got, names) {
		t.Errorf("got variables\n%v\nwant, in this order,\n%v", got, names)
	}
	for _, row := range rows {
		v := byName[row[0]]
		want := "`" + v.Default + "`"
		switch {
		case v.Name == "DATABASE_MAX_CONNECTIONS": // follow the machine
			want = "4 x CPUs, at least 8"
		case v.Name == "MAX_CONCURRENT_HASHES":
			want = "number of CPUs"
		case v.Required:
			want = "required"
		case v.Default == "":
			want = "none"
		}
		if row[1] != want {
			t.Errorf("%s: got default %s, want %s", row[0], row[1], want)
		}
		if v.set == nil {
			continue // named above
		}
		low, high, found := strings.Cut(strings.TrimPrefix(row[2], "0s, "), " to ")
		if !found {
			if row[2] != "" {
				t.Errorf("%s: bounds %q are not of the form A to B", row[0], row[2])
			}
			if v.set("1") == nil && v.set("-1") != nil {
				t.Errorf("%s takes a number: its bounds are missing", row[0])
			}
			continue
		}
		for _, bound := range []struct {
			value string
			ok    bool
		}{{beside(t, low, -1), false}, {low, true}, {high, true}, {beside(t, high, 1), false}} {
			if row[2] == "0s, "+low+" to "+high && bound.value == low {
				if err := v.set("0s"); err != nil {
					t.Errorf("%s: 0s: %v", row[0], err)
				}
			}
			if err := v.set(bound.value); (err == nil) != bound.ok {
				t.Errorf("%s, bounds %s: %s: got error %v", row[0], row[2], bound.value, err)
			}
		}
	}
}

// beside is the value next to a number or a duration.
func beside(t *testing.T, value string, step int) string {
	t.Helper()
	if n, err := strconv.Atoi(value); err == nil {
		return strconv.Itoa(n + step)
	}
	d, err := time.ParseDuration(value)
	if err != nil {
		t.Fatalf("bound %q is neither a number nor a duration", value)
	}
	return (d + time.Duration(step)).String()
}

// servedRoutes is the whole route table.
func servedRoutes() []route {
	return (&Server{cfg: Config{PasswordResetTTL: time.Minute}}).routeTable()
}

// operatorRoutes is what ADMIN_ADDR serves beside the metrics.
func operatorRoutes() []route {
	routes := (&Server{cfg: Config{AdminToken: Secret{"configured"}}}).adminRoutes()
	return slices.DeleteFunc(routes, func(r route) bool { return r.path == "/metrics" })
}

func TestReadmeEndpoints(t *testing.T) {
	rows := paperTable(t, "README.md", "## Endpoints")
	var got, want []string
	for _, row := range rows {
		got = append(got, strings.Trim(row[0], "`")+" "+row[1])
	}
	for _, r := range servedRoutes() {
		want = append(want, r.method+" "+r.path+" "+r.success)
	}
	sameSet(t, "endpoints", got, want)
}

func TestRunbookOperators(t *testing.T) {
	rows := paperTable(t, "RUNBOOK.md", "# 17. Operating accounts")
	var want, paths []string
	for _, r := range operatorRoutes() {
		if r.path != "/api/admin/introspect" {
			paths = append(paths, r.method+" "+strings.TrimPrefix(r.path, "/api/admin/tenants/{tenant}/users/{user}"))
		}
	}
	for _, action := range Actions {
		if ActionTakesArgument(action) {
			action += " VALUE"
		}
		want = append(want, action)
	}
	sameSet(t, "actions", column(rows, 0), want)
	for i := range rows {
		rows[i][1] = strings.Trim(rows[i][1], "`")
	}
	sameSet(t, "paths of actions", trimmed(column(rows, 1)), trimmed(paths))
}

func trimmed(list []string) []string {
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
}

func TestReadmeMetrics(t *testing.T) {
	m := newMetrics(Build{}, func() db.PoolStats { return db.PoolStats{} }, servedRoutes())
	m.keys(KeyRing{Roles: map[string]string{"k": "current"}})
	w := httptest.NewRecorder()
	m.scrape.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	var want []string
	for _, found := range regexp.MustCompile(`(?m)^# TYPE (auth_\w+)`).FindAllStringSubmatch(w.Body.String(), -1) {
		want = append(want, found[1])
	}
	sameSet(t, "metrics", column(paperTable(t, "README.md", "## Metrics"), 0), want)
}

func TestReadmeEvents(t *testing.T) {
	var want []string
	for _, e := range db.EventTypes {
		if e != db.EventPasswordResetSecret { // for the mailer, not for consumers
			want = append(want, string(e))
		}
	}
	sameSet(t, "events", column(paperTable(t, "README.md", "## Consuming events"), 0), want)
}

func TestRunbookProblems(t *testing.T) {
	var got, want []string
	for _, row := range paperTable(t, "RUNBOOK.md", "# 12. Problem codes") {
		got = append(got, strings.Trim(row[0], "`")+" "+row[1])
	}
	for _, p := range problems {
		want = append(want, fmt.Sprint(p.code, " ", p.status))
	}
	sameSet(t, "problem codes", got, want)
}

func TestRunbookSuccessors(t *testing.T) {
	var got, want []string
	for _, row := range paperTable(t, "RUNBOOK.md", "# 15. Variables of the first version") {
		got = append(got, row[0]+" "+row[1])
	}
	for _, s := range successors {
		want = append(want, s.old+" "+s.new)
	}
	sameSet(t, "successors", got, want)
}

func TestRunbookLogEvents(t *testing.T) {
	written := map[string][]string{} // event to the levels that the sources show
	for _, dir := range []string{"..", ".", "../natsbus", "../db", "../migrate"} {
		findLogEvents(t, dir, written)
	}
	rows := paperTable(t, "RUNBOOK.md", "# 11. Log events")
	sameSet(t, "log events", column(rows, 0), slices.Collect(maps.Keys(written)))
	for _, row := range rows {
		levels := strings.Split(row[1], ", ")
		for _, level := range written[strings.Trim(row[0], "`")] {
			if !slices.Contains(levels, level) {
				t.Errorf("%s: got level %s, want %s", row[0], row[1], level)
			}
		}
	}
}

var eventName = regexp.MustCompile(`^[a-z_]+(\.[a-z_]+)+$`)

// findLogEvents adds the events of one package: the names that stand where a
// line is written, as literals or constants, and constants called log... that
// are used in any other way.
func findLogEvents(t *testing.T, dir string, written map[string][]string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	constants := map[string]string{}
	declared := map[*ast.Ident]bool{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok {
				for i, name := range spec.Names {
					declared[name] = true
					if i < len(spec.Values) {
						constants[name.Name] = literal(spec.Values[i])
					}
				}
			}
			return true
		})
	}
	// event is the name that an expression stands for, "" for none.
	event := func(e ast.Expr) string {
		name := literal(e)
		if ident, ok := e.(*ast.Ident); ok {
			name = constants[ident.Name]
		}
		if !eventName.MatchString(name) {
			return ""
		}
		return name
	}
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				if name := event(n); name != "" && strings.HasPrefix(n.Name, "log") && !declared[n] {
					written[name] = append(written[name], []string{}...)
				}
			case *ast.CallExpr:
				called, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || len(n.Args) == 0 {
					return true
				}
				switch level := strings.ToUpper(called.Sel.Name); level {
				case "DEBUG", "INFO", "WARN", "ERROR":
					if name := event(n.Args[0]); name != "" {
						written[name] = append(written[name], level)
					}
				case "LINE", "LOG", "LOGATTRS": // context, level, event
					if len(n.Args) < 3 {
						return true
					}
					name := event(n.Args[2])
					if level, ok := n.Args[1].(*ast.SelectorExpr); ok && name != "" {
						written[name] = append(written[name], strings.ToUpper(strings.TrimPrefix(level.Sel.Name, "Level")))
					}
				}
			}
			return true
		})
	}
}

func literal(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	s, err := strconv.Unquote(lit.Value)
	if err != nil { // unreachable: the file was parsed
		return ""
	}
	return s
}

// openapiDoc is what the tests read of openapi.json.
type openapiDoc struct {
	OpenAPI    string
	Paths      map[string]map[string]json.RawMessage
	Components struct {
		Schemas   map[string]json.RawMessage
		Responses map[string]openapiResponse
	}
}

type openapiOperation struct {
	OperationID string
	Responses   map[string]openapiResponse
}

type openapiResponse struct {
	Ref     string `json:"$ref"`
	Headers map[string]struct {
		Ref string `json:"$ref"`
	}
	Content map[string]struct {
		Schema struct {
			AllOf []struct {
				Properties struct {
					Code   struct{ Enum []string }
					Status struct{ Enum []int }
				}
			}
		}
		Example  json.RawMessage
		Examples map[string]struct{ Value json.RawMessage }
	}
}

func readOpenAPI(t *testing.T) openapiDoc {
	t.Helper()
	var doc openapiDoc
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// operations returns them by "METHOD /path", with references resolved.
func (d openapiDoc) operations(t *testing.T) map[string]openapiOperation {
	t.Helper()
	all := map[string]openapiOperation{}
	for path, item := range d.Paths {
		for method, raw := range item {
			if method == "parameters" || method == "servers" {
				continue
			}
			var op openapiOperation
			if err := json.Unmarshal(raw, &op); err != nil {
				t.Fatal(err)
			}
			for status, r := range op.Responses {
				if name, ok := strings.CutPrefix(r.Ref, "#/components/responses/"); ok {
					op.Responses[status] = d.Components.Responses[name]
				}
			}
			all[strings.ToUpper(method)+" "+path] = op
		}
	}
	return all
}

// enum is the enum of a property of a schema.
func (d openapiDoc) enum(t *testing.T, schema, property string) []string {
	t.Helper()
	var s struct {
		Properties map[string]struct {
			Enum  []string
			Items struct{ Enum []string }
		}
	}
	if err := json.Unmarshal(d.Components.Schemas[schema], &s); err != nil {
		t.Fatal(err)
	}
	return append(s.Properties[property].Enum, s.Properties[property].Items.Enum...)
}

const problemType = "application/problem+json"

func (r openapiResponse) codes() []string {
	var codes []string
	for _, part := range r.Content[problemType].Schema.AllOf {
		codes = append(codes, part.Properties.Code.Enum...)
	}
	return codes
}

const adminAccount = "/api/admin/tenants/{tenant}/users/{user}"

// Codes that belong together in the table below.
var (
	anyOperation = []string{"internal"}
	dbOperation  = append([]string{"unavailable"}, anyOperation...)
	operator     = append([]string{"unauthorized", "not_found", "rate_limited"}, dbOperation...)
	operatorPost = append([]string{"unauthorized", "not_found"}, anyPost...)
	anyPost      = append([]string{"invalid_request", "request_timeout", "body_too_large", "unsupported_media_type", "rate_limited"}, dbOperation...)
)

// answers is what each operation can answer: its codes of problems, the
// statuses that are no problem, and the event whose counter it counts on.
var answers = map[string]struct {
	codes []string
	plain []string
	event string
}{
	"POST /api/auth/register":                     {append([]string{"weak_password", "unauthorized", "already_registered", "hash_busy"}, anyPost...), []string{"201"}, logRegister},
	"POST /api/auth/login":                        {append([]string{"invalid_credentials", "locked", "hash_busy"}, anyPost...), []string{"200"}, logLogin},
	"POST /api/auth/refresh":                      {append([]string{"invalid_refresh_token"}, anyPost...), []string{"200"}, logRefresh},
	"POST /api/auth/logout":                       {append([]string{"invalid_refresh_token"}, anyPost...), []string{"204"}, logLogout},
	"POST /api/auth/logout-all":                   {append([]string{"invalid_token"}, anyPost...), []string{"204"}, logLogoutAll},
	"GET /api/auth/sessions":                      {append([]string{"invalid_token"}, dbOperation...), []string{"200"}, ""},
	"DELETE /api/auth/sessions/{session_id}":      {append([]string{"invalid_token", "not_found"}, dbOperation...), []string{"204"}, logSessionRevoke},
	"POST /api/auth/password":                     {append([]string{"invalid_token", "invalid_credentials", "weak_password", "locked", "hash_busy"}, anyPost...), []string{"200"}, logPassword},
	"POST /api/auth/forgot-password":              {append([]string{"not_found"}, anyPost...), []string{"202"}, logForgot},
	"POST /api/auth/reset-password":               {append([]string{"not_found", "invalid_reset_token", "weak_password", "hash_busy"}, anyPost...), []string{"204"}, logReset},
	"GET /.well-known/jwks.json":                  {anyOperation, []string{"200", "304"}, ""},
	"GET /.well-known/openid-configuration":       {append([]string{"not_found"}, anyOperation...), []string{"200", "304"}, ""},
	"GET /.well-known/oauth-authorization-server": {append([]string{"not_found"}, anyOperation...), []string{"200", "304"}, ""},
	"GET /health/live":                            {anyOperation, []string{"200"}, ""},
	"GET /health/ready":                           {anyOperation, []string{"200", "503"}, ""},
	"GET /openapi.json":                           {anyOperation, []string{"200", "304"}, ""},
	"GET " + adminAccount:                         {operator, []string{"200"}, ""},
	"DELETE " + adminAccount:                      {operator, []string{"200"}, ""},
	"POST " + adminAccount + "/disable":           {operatorPost, []string{"200"}, ""},
	"POST " + adminAccount + "/enable":            {operatorPost, []string{"200"}, ""},
	"POST " + adminAccount + "/unlock":            {operatorPost, []string{"200"}, ""},
	"POST " + adminAccount + "/revoke-sessions":   {operatorPost, []string{"200"}, ""},
	"POST " + adminAccount + "/set-email":         {append([]string{"already_registered"}, operatorPost...), []string{"200"}, ""},
	"POST " + adminAccount + "/set-claims":        {operatorPost, []string{"200"}, ""},
	"POST " + adminAccount + "/force-reset":       {operatorPost, []string{"200"}, ""},
	"GET " + adminAccount + "/export":             {operator, []string{"200"}, ""},
	"POST /api/admin/introspect":                  {[]string{"invalid_request", "unauthorized", "body_too_large", "unsupported_media_type", "rate_limited", "internal", "unavailable"}, []string{"200"}, ""},
	"GET /metrics":                                {append([]string{"not_found"}, anyOperation...), []string{"200"}, ""},
}

func TestOpenAPIAnswers(t *testing.T) {
	doc := readOpenAPI(t)
	documented := doc.operations(t)
	table := map[string]*problem{}
	for _, p := range problems {
		table[p.code] = p
	}
	var routes []string
	for _, r := range append(servedRoutes(), operatorRoutes()...) {
		routes = append(routes, r.method+" "+r.path)
		if !slices.Contains(answers[r.method+" "+r.path].plain, r.success) {
			t.Errorf("%s %s: its status of success, %s, is not documented", r.method, r.path, r.success)
		}
	}
	sameSet(t, "openapi.json", slices.Collect(maps.Keys(documented)), routes)
	sameSet(t, "answers of this test", slices.Collect(maps.Keys(answers)), routes)
	ids := map[string]bool{}
	for name, op := range documented {
		if op.OperationID == "" || ids[op.OperationID] {
			t.Errorf("%s: got operationId %q, want one of its own", name, op.OperationID)
		}
		ids[op.OperationID] = true
		want := answers[name]
		var codes []string
		statuses := slices.Clone(want.plain)
		for _, code := range want.codes {
			if s := strconv.Itoa(table[code].status); !slices.Contains(statuses, s) {
				statuses = append(statuses, s)
			}
		}
		for status, r := range op.Responses {
			for _, code := range r.codes() {
				codes = append(codes, code)
				if s := strconv.Itoa(table[code].status); s != status {
					t.Errorf("%s: %s is documented under %s, want %s", name, code, status, s)
				}
			}
		}
		sameSet(t, name+" statuses", slices.Collect(maps.Keys(op.Responses)), statuses)
		sameSet(t, name+" codes", codes, want.codes)
		if want.event == "" {
			continue
		}
		counter := want.event
		if shared, ok := sharedResults[counter]; ok {
			counter = shared
		}
		for _, code := range want.codes {
			if label := table[code].result; code != "not_found" && !slices.Contains(results[counter].values, label) {
				t.Errorf("%s: the result %s of %s has no series", name, label, code)
			}
		}
	}
}

// TestOpenAPIProblems: what is documented of each problem is what writeProblem
// makes of it, headers included.
func TestOpenAPIProblems(t *testing.T) {
	doc := readOpenAPI(t)
	var codes, shown []string
	table := map[string]*problem{}
	for _, p := range problems {
		codes = append(codes, p.code)
		table[p.code] = p
	}
	sameSet(t, "code of Problem", doc.enum(t, "Problem", "code"), codes)
	for name, r := range doc.Components.Responses {
		media, isProblem := r.Content[problemType]
		if !isProblem {
			continue
		}
		examples := map[string]json.RawMessage{}
		for code, e := range media.Examples {
			examples[code] = e.Value
		}
		if len(r.codes()) == 1 {
			examples[r.codes()[0]] = media.Example
		}
		sameSet(t, name+" examples", slices.Collect(maps.Keys(examples)), r.codes())
		for code, example := range examples {
			shown = append(shown, code)
			var body problemJSON
			if err := json.Unmarshal(example, &body); err != nil || body.Code != code {
				t.Errorf("%s: the example of %s: %v", name, code, err)
				continue
			}
			w := httptest.NewRecorder()
			setHeaders(w.Header(), body.TraceID)
			w.Header().Set("Allow", "GET") // by mux
			writeProblem(w, body.TraceID, &failure{problem: table[code], fields: body.Errors, reasons: body.Reasons})
			var compact bytes.Buffer
			if err := json.Compact(&compact, example); err != nil {
				t.Fatal(err)
			}
			if got := compact.String(); got+"\n" != w.Body.String() {
				t.Errorf("%s: the example of %s is\n%s\nwant\n%s", name, code, got, w.Body)
			}
			for _, header := range []string{"Retry-After", "WWW-Authenticate", "X-Trace-Id", "Cache-Control"} {
				_, documented := r.Headers[header]
				if sent := w.Header().Get(header) != ""; sent && !documented || documented && !sent && len(examples) == 1 {
					t.Errorf("%s: %s of %s: documented %t, sent %t", name, header, code, documented, sent)
				}
			}
		}
	}
	sameSet(t, "problems shown", slices.Compact(slices.Sorted(slices.Values(shown))), codes)
	if _, ok := doc.Components.Responses["MethodNotAllowed"].Headers["Allow"]; !ok {
		t.Error("MethodNotAllowed: no Allow")
	}
}

// TestOpenAPIReasons holds the two lists of reasons to the places where they
// stand in the code.
func TestOpenAPIReasons(t *testing.T) {
	doc := readOpenAPI(t)
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fields, weak := map[string]bool{}, map[string]bool{}
	find := func(into map[string]bool, pattern string, text []byte) {
		for _, found := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
			into[string(found[1])] = true
		}
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		find(fields, `fieldError\{.*, "([a-z_0-9]+)"\}`, text)
		find(weak, `append\(reasons, "([a-z_]+)"\)`, text)
		if path == "decode.go" { // of member.decode
			find(fields, `(?m)^\t\treturn "([a-z_]+)"`, text)
		}
		if path == "admin.go" { // of checkClaims
			find(fields, `(?m)^\t\treturn "([a-z_]+)"`, text)
		}
	}
	sameSet(t, "reason of FieldError", doc.enum(t, "FieldError", "reason"), slices.Collect(maps.Keys(fields)))
	sameSet(t, "reasons of Problem", doc.enum(t, "Problem", "reasons"), slices.Collect(maps.Keys(weak)))
}

// TestOpenAPIExamples: the tokens shown are real ones. The key that signed
// them is not kept.
func TestOpenAPIExamples(t *testing.T) {
	doc := readOpenAPI(t)
	jwks := doc.operations(t)["GET /.well-known/jwks.json"].Responses["200"].Content["application/json"].Example
	keys, err := jwt.ParseJWKS(jwks)
	if err != nil {
		t.Fatal(err)
	}
	var tokens tokenResponse
	if err := json.Unmarshal(doc.Components.Responses["Tokens"].Content["application/json"].Example, &tokens); err != nil {
		t.Fatal(err)
	}
	var issued struct {
		At int64 `json:"iat"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(tokens.AccessToken, ".")[1])
	if err != nil || json.Unmarshal(payload, &issued) != nil {
		t.Fatalf("the access token shown: %v", err)
	}
	claims, err := jwt.NewVerifier("https://auth.example.com", "identity-auth", keys).VerifyAt(t.Context(), tokens.AccessToken, time.Unix(issued.At, 0))
	if err != nil {
		t.Fatalf("the access token shown: %v", err)
	}
	refresh, err := parseRefreshToken(tokens.RefreshToken)
	if err != nil || refresh.session.String() != claims.SessionID {
		t.Errorf("the refresh token shown: %v, session %v, want that of the access token, %s", err, refresh.session, claims.SessionID)
	}
	if lasts := claims.ExpiresAt.Sub(claims.IssuedAt); tokens.ExpiresIn != int64(lasts/time.Second) || tokens.TokenType != "Bearer" {
		t.Errorf("the tokens shown: got expires_in %d of %v", tokens.ExpiresIn, lasts)
	}
}

func TestOpenAPIIsServed(t *testing.T) {
	w := httptest.NewRecorder()
	(&Server{openAPIETag: etagOf(openAPI)}).handleOpenAPI(w, httptest.NewRequest("GET", "/openapi.json", nil))
	if w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), openAPI) || !strings.HasPrefix(readOpenAPI(t).OpenAPI, "3.1.") {
		t.Errorf("got %d and %d bytes, want 200 and the %d bytes of an OpenAPI 3.1 document", w.Code, w.Body.Len(), len(openAPI))
	}
}
