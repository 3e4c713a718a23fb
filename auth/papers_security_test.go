package auth

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The tests below hold SECURITY.md to the code and to the standard that it
// answers.

func securityText(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	testName = regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9]*)`")
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(\w+ \*testing\.[TFB]\)`)
	fileName = regexp.MustCompile("`((?:[a-z0-9_]+/)*[a-zA-Z0-9_-]+\\.(?:go|sql|md|json|sh|pml))`")
)

// definedTests are the names of all test functions of the repository, nested
// modules and build tags included.
func definedTests(t *testing.T) map[string]bool {
	t.Helper()
	defined := map[string]bool{}
	err := filepath.WalkDir("..", func(file string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && file != ".." && strings.HasPrefix(e.Name(), "."):
			return filepath.SkipDir
		case e.IsDir() || !strings.HasSuffix(file, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(file)
		for _, found := range testFunc.FindAllSubmatch(text, -1) {
			defined[string(found[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return defined
}

// TestSecurityNames: every test and every file that SECURITY.md names exists.
func TestSecurityNames(t *testing.T) {
	text, defined := securityText(t), definedTests(t)
	names := testName.FindAllStringSubmatch(text, -1)
	if len(names) < 100 { // or the pattern matches nothing any more
		t.Errorf("got %d names of tests, want more", len(names))
	}
	missing := map[string]bool{}
	for _, name := range names {
		if !defined[name[1]] && !missing[name[1]] {
			missing[name[1]] = true
			t.Errorf("%s stands in SECURITY.md, but no _test.go file has it", name[1])
		}
	}
	files := fileName.FindAllStringSubmatch(text, -1)
	if len(files) < 20 {
		t.Errorf("got %d names of files, want more", len(files))
	}
	for _, name := range files {
		if _, err := os.Stat(filepath.Join("..", name[1])); err != nil {
			t.Error(err)
		}
	}
}

// answered fails unless a cell names a test, or says with a reason why there
// is none.
func answered(t *testing.T, row, cell string) {
	t.Helper()
	if testName.MatchString(cell) {
		return
	}
	for _, word := range []string{"deviation: ", "not applicable: "} {
		if _, reason, ok := strings.Cut(cell, word); ok && len(strings.Fields(reason)) >= 2 {
			return
		}
	}
	t.Errorf("%s: got %q, want a test, or a deviation or \"not applicable\" with its reason", row, cell)
}

func TestSecurityAbuseCases(t *testing.T) {
	for _, row := range paperTable(t, "SECURITY.md", "### Abuse cases") {
		if len(row) != 3 || row[0] == "" || row[1] == "" {
			t.Errorf("got %q, want three cells", row)
			continue
		}
		answered(t, row[0], row[2])
	}
}

// asvsSections is how many requirements each section of ASVS 5.0.0 has.
var asvsSections = map[string]int{
	"1.1": 2, "1.2": 10, "1.3": 12, "1.4": 3, "1.5": 3,
	"2.1": 3, "2.2": 3, "2.3": 5, "2.4": 2,
	"3.1": 1, "3.2": 3, "3.3": 5, "3.4": 8, "3.5": 8, "3.6": 1, "3.7": 5,
	"4.1": 5, "4.2": 5, "4.3": 2, "4.4": 4,
	"5.1": 1, "5.2": 6, "5.3": 3, "5.4": 3,
	"6.1": 3, "6.2": 12, "6.3": 8, "6.4": 6, "6.5": 8, "6.6": 4, "6.7": 2, "6.8": 4,
	"7.1": 3, "7.2": 4, "7.3": 2, "7.4": 5, "7.5": 3, "7.6": 2,
	"8.1": 4, "8.2": 4, "8.3": 3, "8.4": 2,
	"9.1": 3, "9.2": 4,
	"10.1": 2, "10.2": 3, "10.3": 5, "10.4": 16, "10.5": 5, "10.6": 2, "10.7": 3,
	"11.1": 4, "11.2": 5, "11.3": 5, "11.4": 4, "11.5": 2, "11.6": 2, "11.7": 2,
	"12.1": 5, "12.2": 2, "12.3": 5,
	"13.1": 4, "13.2": 6, "13.3": 4, "13.4": 7,
	"14.1": 2, "14.2": 8, "14.3": 3,
	"15.1": 5, "15.2": 5, "15.3": 7, "15.4": 4,
	"16.1": 1, "16.2": 5, "16.3": 4, "16.4": 3, "16.5": 4,
	"17.1": 2, "17.2": 8, "17.3": 2,
}

// splitRequirement cuts 6.2.12 into 6.2 and 12.
func splitRequirement(t *testing.T, id string) (section string, n int) {
	t.Helper()
	dot := strings.LastIndexByte(id, '.')
	n, err := strconv.Atoi(id[dot+1:])
	if dot < 0 || err != nil {
		t.Fatalf("%q is no requirement", id)
	}
	return id[:dot], n
}

// TestSecurityASVS: every requirement of the standard stands in exactly one
// row, and every row says what holds it.
func TestSecurityASVS(t *testing.T) {
	rowsOf := map[string]int{}
	for _, row := range paperTable(t, "SECURITY.md", "## OWASP ASVS 5.0") {
		if len(row) != 4 || row[1] == "" || row[2] == "" {
			t.Errorf("got %q, want four cells", row)
			continue
		}
		answered(t, row[0], row[3])
		for part := range strings.SplitSeq(row[0], ", ") {
			first, last, isRange := strings.Cut(part, "-")
			section, from := splitRequirement(t, first)
			to := from
			if isRange {
				var same string
				if same, to = splitRequirement(t, last); same != section || to <= from {
					t.Errorf("%q is no range of one section", part)
				}
			}
			for n := from; n <= to; n++ {
				rowsOf[fmt.Sprint(section, ".", n)]++
			}
		}
	}
	total := 0
	for section, size := range asvsSections {
		for n := 1; n <= size; n++ {
			id := fmt.Sprint(section, ".", n)
			if rowsOf[id] != 1 {
				t.Errorf("%s stands in %d rows, want 1", id, rowsOf[id])
			}
			delete(rowsOf, id)
			total++
		}
	}
	for id := range rowsOf {
		t.Errorf("%s is no requirement of ASVS 5.0.0", id)
	}
	if total != 345 {
		t.Errorf("got %d requirements, want the standard's 345", total)
	}
}

// TestSecurityInventory holds the inventory of cryptography to the imports of
// everything that ships: each import stands in a row beside its file, and each
// row's files have its imports.
func TestSecurityInventory(t *testing.T) {
	listed := map[string]bool{} // "file import"
	for _, row := range paperTable(t, "SECURITY.md", "## Cryptography") {
		imports := strings.Split(strings.ReplaceAll(row[1], "`", ""), ", ")
		for _, file := range fileName.FindAllStringSubmatch(row[3], -1) {
			for _, path := range imports {
				listed[file[1]+" "+path] = true
			}
		}
	}
	imported := map[string]bool{}
	for _, dir := range []string{".", "auth", "db", "jwt", "migrate", "natsbus"} {
		files, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no Go files in %s: %v", dir, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.ToSlash(strings.TrimPrefix(file, ".."+string(filepath.Separator)))
			for _, spec := range parsed.Imports {
				path, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if path == "crypto" || strings.HasPrefix(path, "crypto/") || strings.HasPrefix(path, "hash/") || strings.HasPrefix(path, "golang.org/x/crypto/") {
					imported[name+" "+path] = true
					if !listed[name+" "+path] {
						t.Errorf("%s imports %s: no row of the inventory names both", name, path)
					}
				}
			}
		}
	}
	for _, row := range paperTable(t, "SECURITY.md", "## Cryptography") {
		for _, path := range strings.Split(strings.ReplaceAll(row[1], "`", ""), ", ") {
			used := slices.ContainsFunc(fileName.FindAllStringSubmatch(row[3], -1), func(file []string) bool { return imported[file[1]+" "+path] })
			if !used {
				t.Errorf("inventory, %s: none of its files imports %s", row[0], path)
			}
		}
	}
}
