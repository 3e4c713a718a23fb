package main_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/7d-solutions/identity-auth"

// rooms says what the Go files of each directory may import beside the
// standard library: packages of ours, and other modules with the files (a
// pattern) that may import them. A directory without an entry holds no Go.
var rooms = map[string]struct {
	ours    []string
	modules map[string]string
}{
	".":       {ours: []string{"auth", "db", "jwt", "migrate", "natsbus", "sql"}},
	"auth":    {[]string{"db", "jwt"}, map[string]string{"golang.org/x/crypto": "hash*.go", "github.com/prometheus/client_golang": "metrics.go"}},
	"db":      {nil, map[string]string{"github.com/jackc/pgx/v5": "*.go"}},
	"jwt":     {},
	"migrate": {nil, map[string]string{"github.com/jackc/pgx/v5": "*.go"}},
	"natsbus": {[]string{"db"}, map[string]string{"github.com/nats-io/nats.go": "*.go"}},
	"sql":     {},

	"db/dbtest":        {[]string{"migrate", "sql"}, map[string]string{"github.com/jackc/pgx/v5": "*.go"}},
	"natsbus/natstest": {nil, map[string]string{"github.com/nats-io/nats.go": "*.go"}},
}

// testRooms are for tests only, though not in test files: nested modules
// import them too.
var testRooms = []string{"db/dbtest", "natsbus/natstest"}

// banned packages open debug ports, give predictable numbers, or leave Go's
// memory safety.
var banned = []string{"net/http/pprof", "expvar", "math/rand", "unsafe", "C"}

func TestImportsAndInit(t *testing.T) {
	for file, text := range goFiles(t) {
		dir, name := path.Split(file)
		dir = path.Clean(dir)
		room, ok := rooms[dir]
		if !ok {
			t.Errorf("%s: no room for Go files is called %s", file, dir)
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, text, parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			allowed := !slices.Contains(banned, imported)
			if ours, ok := strings.CutPrefix(imported, module+"/"); ok {
				allowed = slices.Contains(room.ours, ours)
			} else if first, _, _ := strings.Cut(imported, "/"); strings.Contains(first, ".") {
				allowed = false
				for m, pattern := range room.modules {
					if imported == m || strings.HasPrefix(imported, m+"/") {
						allowed, _ = path.Match(pattern, name)
					}
				}
			}
			if !allowed {
				t.Errorf("%s imports %s", file, imported)
			}
		}
		for _, decl := range parsed.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				t.Errorf("%s has an init function: nothing happens before run", file)
			}
		}
	}
}

// What a reviewer reads, without blank and comment lines. The number goes down,
// or up with a reason in the commit.
func TestSizeStaysReadable(t *testing.T) {
	const limit = 7900
	lines := 0
	for file, text := range goFiles(t) {
		if slices.Contains(testRooms, path.Dir(file)) {
			continue
		}
		for line := range bytes.Lines(text) {
			if line = bytes.TrimSpace(line); len(line) > 0 && !bytes.HasPrefix(line, []byte("//")) {
				lines++
			}
		}
	}
	if lines > limit {
		t.Errorf("Go lines without tests, blanks and comments: got %d, want at most %d", lines, limit)
	}
}

func TestDirectDependencies(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	inRequire := false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		single, isSingle := strings.CutPrefix(line, "require ")
		switch {
		case line == "require (":
			inRequire = true
		case line == ")":
			inRequire = false
		case (inRequire || isSingle) && line != "" && !strings.HasPrefix(line, "//") && !strings.HasSuffix(line, "// indirect"):
			got = append(got, strings.Fields(single)[0])
		}
	}
	slices.Sort(got)
	want := []string{
		"github.com/jackc/pgx/v5",
		"github.com/nats-io/nats.go",
		"github.com/prometheus/client_golang",
		"golang.org/x/crypto",
	}
	if !slices.Equal(got, want) {
		t.Errorf("direct requires of go.mod: got %q, want %q", got, want)
	}
}

func TestTopLevel(t *testing.T) {
	allowed := []string{
		"main.go", "auth", "db", "jwt", "natsbus", "migrate", "sql", "testdata", "deploy",
		"Dockerfile", "docker-compose.yml", "go.mod", "go.sum", "Makefile",
		"README.md", "RUNBOOK.md", "SECURITY.md", "LICENSE",
	}
	ignored := []string{"identity-auth", "*.test", "*.out", "*.prof"} // by git: what go build and go test leave behind
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := e.Name()
		leftover := slices.ContainsFunc(ignored, func(pattern string) bool { ok, _ := path.Match(pattern, name); return ok })
		if !leftover && !strings.HasPrefix(name, ".") && !strings.HasSuffix(name, "_test.go") && !slices.Contains(allowed, name) {
			t.Errorf("%s does not belong at the top level", name)
		}
	}
}

// goFiles returns the text of every Go file but tests, by its slash-separated
// path. Hidden directories and testdata, with the nested modules, are not ours
// to hold here.
func goFiles(t *testing.T) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(".", func(file string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && file != "." && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata"):
			return filepath.SkipDir
		case e.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go"):
			return nil
		}
		files[filepath.ToSlash(file)], err = os.ReadFile(file)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files["sql/embed.go"] == nil { // or the tests above would hold of nothing
		t.Fatal("sql/embed.go not found: this is not the root of the module")
	}
	return files
}
