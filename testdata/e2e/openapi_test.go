package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

// document is the OpenAPI document of this source tree.
var document = sync.OnceValues(func() (*openapi3.T, error) {
	doc, err := openapi3.NewLoader().LoadFromFile("../../auth/openapi.json")
	if err == nil {
		err = doc.Validate(context.Background())
	}
	return doc, err
})

// held holds every answer that s gives from now on to what must be true of all
// answers, and to the OpenAPI document. When the test is over it stops s and
// looks for every secret that went over the wire in everything that s wrote.
func held(t *testing.T, s *service) *service {
	t.Helper()
	doc, err := document()
	if err != nil {
		t.Fatalf("auth/openapi.json: %v", err)
	}
	h := &holder{t: t, doc: doc, admin: s.adminAddr(), next: s.client.Transport, secrets: map[string]string{}, told: map[string]bool{}, seen: map[string]error{}}
	s.client.Transport = h
	t.Cleanup(func() {
		if !s.stopped {
			if code := s.stop(); code != 0 {
				t.Errorf("service ended with exit code %d", code)
			}
		}
		h.checkOutput(s)
	})
	return s
}

// adminAddr is what ADMIN_ADDR says, "" when it is not set.
func (s *service) adminAddr() string {
	for _, v := range s.cmd.Env {
		if addr, ok := strings.CutPrefix(v, "ADMIN_ADDR="); ok {
			return addr
		}
	}
	return ""
}

// holder is the transport of a service under held.
type holder struct {
	t     *testing.T
	doc   *openapi3.T
	admin string // address of the second listener, "" for none
	next  http.RoundTripper

	mu      sync.Mutex
	secrets map[string]string // to where it was seen
	told    map[string]bool   // a fault is told once, not for every request
	seen    map[string]error  // refusals that were held against the document before
}

// CloseIdleConnections lets http.Client reach the connections.
func (h *holder) CloseIdleConnections() {
	if c, ok := h.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

func (h *holder) RoundTrip(req *http.Request) (*http.Response, error) {
	var sent []byte
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, err
		}
		if sent, err = io.ReadAll(body); err != nil {
			return nil, err
		}
	}
	resp, err := h.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	a := answer{resp.StatusCode, resp.Header, body}
	h.remember(sent)
	h.remember(body)
	wrong := append(wrongHeaders(req.Method, req.URL.Path, a), wrongProblem(req.Method, a)...)
	if err := h.undocumentedOnce(req, sent, a); err != nil {
		wrong = append(wrong, fmt.Sprintf("not as in openapi.json: %v", err))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, w := range wrong {
		fault := fmt.Sprintf("%s %.100s answered %d: %s", req.Method, req.URL.Path, a.status, w)
		if !h.told[fault] {
			h.told[fault] = true
			h.t.Errorf("%s\nbody: %.300q", fault, a.body)
		}
	}
	return resp, nil
}

var (
	uuidForm  = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	traceForm = regexp.MustCompile(`^([0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$`)
)

// cacheable are the paths whose good answers anyone may keep.
var cacheable = []string{"/.well-known/jwks.json", "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server", "/openapi.json"}

// wrongHeaders tells what is wrong with the headers that every answer has.
func wrongHeaders(method, path string, a answer) (wrong []string) {
	want := map[string]string{
		"X-Content-Type-Options":  "nosniff",
		"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
		"Referrer-Policy":         "no-referrer",
		"Cache-Control":           "no-store",
		"Server":                  "",
		"X-Powered-By":            "",
	}
	if slices.Contains(cacheable, path) && (a.status == 200 || a.status == 304) {
		want["Cache-Control"] = "public, max-age=300"
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got := a.header.Get(name); got != want[name] {
			wrong = append(wrong, fmt.Sprintf("got %s %q, want %q", name, got, want[name]))
		}
	}
	if got := a.header.Get("X-Trace-Id"); !traceForm.MatchString(got) {
		wrong = append(wrong, fmt.Sprintf("got X-Trace-Id %q, want a UUID or 32 digits", got))
	}
	if got := a.header.Get("Strict-Transport-Security"); !regexp.MustCompile(`^max-age=[1-9][0-9]{6,}`).MatchString(got) {
		wrong = append(wrong, fmt.Sprintf("got Strict-Transport-Security %q, want a max-age of months", got))
	}
	if a.status == 423 || a.status == 429 || a.status == 503 {
		if n, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || n < 1 {
			wrong = append(wrong, fmt.Sprintf("got Retry-After %q, want whole seconds, at least 1", a.header.Get("Retry-After")))
		}
	}
	if a.status == 405 && a.header.Get("Allow") == "" {
		wrong = append(wrong, "no Allow")
	}
	return wrong
}

// wrongProblem tells what is wrong with the form of an error (RFC 9457).
func wrongProblem(method string, a answer) (wrong []string) {
	notReady := a.status == 503 && bytes.HasPrefix(a.body, []byte(`{"status":"not_ready"`))
	if a.status < 400 || notReady {
		return nil
	}
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		wrong = append(wrong, fmt.Sprintf("got Content-Type %q, want application/problem+json", got))
	}
	if method == http.MethodHead {
		return wrong
	}
	var p struct {
		Type, Title, Detail, Code *string
		Status                    *int
		TraceID                   *string `json:"trace_id"`
		Errors                    []struct{ Field, Reason string }
		Reasons                   []string
	}
	d := json.NewDecoder(bytes.NewReader(a.body))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return append(wrong, fmt.Sprintf("not a problem: %v", err))
	}
	if p.Type == nil || p.Title == nil || p.Detail == nil || p.Code == nil || p.Status == nil || p.TraceID == nil {
		return append(wrong, "type, title, detail, code, status or trace_id is missing")
	}
	if *p.Title == "" || *p.Detail == "" || *p.Code == "" {
		wrong = append(wrong, "title, detail or code is empty")
	}
	if u, err := url.Parse(*p.Type); err != nil || *p.Type == "" || u.String() != *p.Type {
		wrong = append(wrong, fmt.Sprintf("got type %q, want a URI", *p.Type))
	}
	if *p.Status != a.status {
		wrong = append(wrong, fmt.Sprintf("got status %d in the body", *p.Status))
	}
	if *p.TraceID != a.header.Get("X-Trace-Id") {
		wrong = append(wrong, fmt.Sprintf("got trace_id %q, want that of X-Trace-Id, %q", *p.TraceID, a.header.Get("X-Trace-Id")))
	}
	if (len(p.Errors) > 0) != (*p.Code == "invalid_request") || (len(p.Reasons) > 0) != (*p.Code == "weak_password") {
		wrong = append(wrong, "errors belong to invalid_request and reasons to weak_password, there alone and always")
	}
	for _, e := range p.Errors {
		if e.Reason == "" {
			wrong = append(wrong, "an error without a reason")
		}
	}
	return wrong
}

// undocumentedOnce is undocumented for the first of the refusals that differ
// only in their trace id: there are thousands, and schemas are slow.
func (h *holder) undocumentedOnce(req *http.Request, sent []byte, a answer) error {
	if a.status < 400 {
		return h.undocumented(req, sent, a)
	}
	headers := a.header.Clone()
	for _, name := range []string{"Date", "X-Trace-Id", "Content-Length"} {
		headers.Del(name)
	}
	body := strings.ReplaceAll(string(a.body), a.header.Get("X-Trace-Id"), "")
	key := fmt.Sprint(req.Method, " ", req.URL, " ", a.status, headers, body)
	h.mu.Lock()
	err, known := h.seen[key]
	h.mu.Unlock()
	if known {
		return err
	}
	err = h.undocumented(req, sent, a)
	h.mu.Lock()
	h.seen[key] = err
	h.mu.Unlock()
	return err
}

// undocumented tells in what an exchange differs from the document: a path, a
// status, a header or a body; and a request that was let in must be one that
// the document allows.
func (h *holder) undocumented(req *http.Request, sent []byte, a answer) error {
	path, item, params := documentedPath(h.doc, req.URL)
	if item != nil && !h.serves(req.URL.Host, path, item) {
		item = nil
	}
	method := req.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	if item == nil || item.GetOperation(method) == nil {
		preflight := req.Method == http.MethodOptions && a.status == 204
		if want := map[bool]int{true: 404, false: 405}[item == nil]; a.status != want && !preflight {
			return fmt.Errorf("not in the document, so it should be %d", want)
		}
		return nil
	}
	in := &openapi3filter.RequestValidationInput{
		Request:    req.Clone(context.Background()),
		PathParams: params,
		Route:      &routers.Route{Spec: h.doc, Path: path, PathItem: item, Method: method, Operation: item.GetOperation(method)},
		Options:    &openapi3filter.Options{IncludeResponseStatus: true, AuthenticationFunc: openapi3filter.NoopAuthenticationFunc},
	}
	err := openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: a.status, Header: a.header, Body: io.NopCloser(bytes.NewReader(a.body)), Options: in.Options,
	})
	if err != nil || a.status >= 400 {
		return err
	}
	in.Request.Body = io.NopCloser(bytes.NewReader(sent))
	if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
		return fmt.Errorf("the request was let in: %v", err)
	}
	return nil
}

// serves tells whether the listener at host has the path: those with servers of
// their own are on ADMIN_ADDR, and so is /metrics if there is one.
func (h *holder) serves(host, path string, item *openapi3.PathItem) bool {
	ofAdmin := len(item.Servers) > 0 || path == "/metrics" && h.admin != ""
	return ofAdmin == (h.admin != "" && host == h.admin)
}

// documentedPath finds the path of the document that u is, with its parameters.
func documentedPath(doc *openapi3.T, u *url.URL) (path string, item *openapi3.PathItem, params map[string]string) {
	segments := strings.Split(u.EscapedPath(), "/")
	for path, item := range doc.Paths.Map() {
		names := strings.Split(path, "/")
		params := map[string]string{}
		matches := func(name, segment string) bool {
			if strings.HasPrefix(name, "{") {
				params[strings.Trim(name, "{}")] = segment
				return segment != ""
			}
			return name == segment
		}
		same := len(names) == len(segments)
		for i := 0; same && i < len(names); i++ {
			same = matches(names[i], segments[i])
		}
		if same {
			return path, item, params
		}
	}
	return "", nil, nil
}

// secretMembers are the members of requests and answers that no log may hold.
var secretMembers = []string{"password", "email", "access_token", "refresh_token"}

// remember keeps what is secret in a body. Texts that a log may well have by
// chance, such as a password of twelve zeros, are left out.
func (h *holder) remember(body []byte) {
	var m map[string]any
	if json.Unmarshal(body, &m) != nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, name := range secretMembers {
		secret, _ := m[name].(string)
		distinct := map[rune]bool{}
		for _, r := range secret {
			distinct[r] = true
		}
		if len(secret) >= 10 && len(distinct) >= 6 {
			h.secrets[strings.TrimSpace(secret)] = name
			h.secrets[strings.ToLower(strings.TrimSpace(secret))] = name
		}
	}
}

// checkOutput holds every line that s wrote to the form of a log line, and
// looks for the secrets.
func (h *holder) checkOutput(s *service) {
	lines := s.tail(1 << 30)
	for _, line := range lines {
		if wrong := wrongLine(line); wrong != "" {
			h.t.Errorf("log line %q: %s", line, wrong)
		}
	}
	output := strings.Join(lines, "\n") + s.errors()
	h.mu.Lock()
	defer h.mu.Unlock()
	for secret, where := range h.secrets {
		quoted, err := json.Marshal(secret)
		if err != nil {
			h.t.Fatal(err)
		}
		if strings.Contains(output, secret) || strings.Contains(output, string(quoted[1:len(quoted)-1])) {
			h.t.Errorf("the log holds the %s %q", where, secret)
		}
	}
}

func TestOpenAPIDocument(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited))
	doc, err := document()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Errorf("got version %q, want 3.1", doc.OpenAPI)
	}
	a := s.get("/openapi.json")
	served, err := openapi3.NewLoader().LoadFromData(a.body)
	if err != nil {
		t.Fatalf("/openapi.json: %v", err)
	}
	if got, want := toJSON(served), toJSON(doc); !bytes.Equal(got, want) {
		t.Error("/openapi.json is not auth/openapi.json")
	}
	if got := a.header.Get("Content-Type"); got != "application/json" && got != "application/vnd.oai.openapi+json;version=3.1" {
		t.Errorf("got Content-Type %q", got)
	}
	if a := s.get("/openapi.json", "If-None-Match", a.header.Get("ETag")); a.status != 304 {
		t.Errorf("with If-None-Match: got %d, want 304", a.status)
	}

	// Every route is a series of the histogram from the start: what is served
	// is what is documented.
	var documented, operators, measured []string
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			switch {
			case method == http.MethodHead: // goes without saying where there is GET
			case len(item.Servers) > 0:
				operators = append(operators, method+" "+path)
			default:
				documented = append(documented, method+" "+path)
			}
		}
	}
	series := regexp.MustCompile(`(?m)^auth_http_request_duration_seconds_count\{method="([A-Z]+)",route="([^"]+)",`)
	for _, m := range series.FindAllSubmatch(s.get("/metrics").body, -1) {
		measured = append(measured, string(m[1])+" "+string(m[2]))
	}
	slices.Sort(documented)
	slices.Sort(measured)
	if measured = slices.Compact(measured); !slices.Equal(documented, measured) {
		t.Errorf("got routes\n%s\nwant those of openapi.json\n%s", strings.Join(measured, "\n"), strings.Join(documented, "\n"))
	}
	if got, want := documented, slices.Sorted(slices.Values(routes())); !slices.Equal(got, want) {
		t.Errorf("documented: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, route := range documented {
		method, path, _ := strings.Cut(route, " ")
		a := s.do(method, path, []byte(`{}`), "Content-Type", "application/json")
		discovery := strings.HasSuffix(path, "-configuration") || strings.HasSuffix(path, "-server")
		if a.status == 405 || a.status == 404 && !discovery {
			t.Errorf("%s: got %d, want it to be served", route, a.status)
		}
	}
	for _, route := range operators {
		method, path, _ := strings.Cut(route, " ")
		if a := s.do(method, path, []byte(`{}`)); a.status != 404 {
			t.Errorf("%s on PORT: got %d, want 404", route, a.status)
		}
	}
}

// routes is what this service serves.
func routes() []string {
	return []string{
		"POST /api/auth/register",
		"POST /api/auth/login",
		"POST /api/auth/refresh",
		"POST /api/auth/logout",
		"POST /api/auth/logout-all",
		"GET /api/auth/sessions",
		"DELETE /api/auth/sessions/{session_id}",
		"POST /api/auth/password",
		"POST /api/auth/forgot-password",
		"POST /api/auth/reset-password",
		"GET /.well-known/jwks.json",
		"GET /.well-known/openid-configuration",
		"GET /.well-known/oauth-authorization-server",
		"GET /health/live",
		"GET /health/ready",
		"GET /metrics",
		"GET /openapi.json",
	}
}

// TestOpenAPICatchesLies: the validator this suite relies on does refuse what
// the document does not allow.
func TestOpenAPICatchesLies(t *testing.T) {
	t.Parallel()
	doc, err := document()
	if err != nil {
		t.Fatal(err)
	}
	const trace = "3f1c1e6a-3c1f-4bb0-8a6e-0a3b8c1d2e3f"
	login := `{"tenant_id":"` + newUUID() + `","email":"a@example.com","password":"x"}`
	good := `{"access_token":"a.b.c","token_type":"Bearer","expires_in":900,"expires_in_seconds":900,"refresh_token":"iar_x","refresh_expires_in":9}`
	for _, row := range []struct {
		name, path, sent string
		status           int
		mediaType, body  string
	}{
		{"status that is not documented", loginPath, login, 418, "application/problem+json", `{}`},
		{"media type that is not documented", loginPath, login, 200, "text/html", good},
		{"member missing", loginPath, login, 200, "application/json", strings.Replace(good, `"expires_in":900,`, ``, 1)},
		{"member of another type", loginPath, login, 200, "application/json", strings.Replace(good, `"expires_in":900,`, `"expires_in":"900",`, 1)},
		{"path that is not documented", "/api/auth/nonsense", login, 200, "application/json", good},
		{"request without a member was let in", loginPath, `{"email":"a@example.com","password":"x"}`, 200, "application/json", good},
		{"request with another member was let in", loginPath, strings.Replace(login, "{", `{"admin":true,`, 1), 200, "application/json", good},
	} {
		h := &holder{t: t, doc: doc}
		req, err := http.NewRequest("POST", "http://127.0.0.1"+row.path, strings.NewReader(row.sent))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		a := answer{row.status, http.Header{"Content-Type": {row.mediaType}, "X-Trace-Id": {trace}}, []byte(row.body)}
		if h.undocumented(req, []byte(row.sent), a) == nil {
			t.Errorf("%s: not noticed", row.name)
		}
	}
}
