package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// step is one command of a session in the README and what it prints.
type step struct{ command, output string }

// sessions reads the fenced blocks of a text that begin with a `$ ` line.
func sessions(text string) (blocks [][]step) {
	var block []step
	inFence := false
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "```"):
			if len(block) > 0 {
				blocks = append(blocks, block)
			}
			inFence, block = !inFence, nil
		case !inFence:
		case strings.HasPrefix(line, "$ "):
			block = append(block, step{command: line[len("$ "):]})
		case len(block) > 0 && strings.HasSuffix(block[len(block)-1].command, `\`):
			block[len(block)-1].command += "\n" + line
		case len(block) > 0:
			block[len(block)-1].output += line + "\n"
		}
	}
	return blocks
}

// pattern matches what a step may print: `...` stands for some text of a line.
func (s step) pattern() *regexp.Regexp {
	quoted := regexp.QuoteMeta(s.output)
	return regexp.MustCompile(`^` + strings.ReplaceAll(quoted, `\.\.\.`, `[^\n]+`) + `$`)
}

// TestReadmeSession: the session of the README is true to the letter.
func TestReadmeSession(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatal("curl is not on PATH: apt-get install curl")
	}
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := sessions(string(text))
	if len(blocks) == 0 {
		t.Fatal("README.md has no block with `$ ` commands")
	}
	const documented = "http://localhost:8080"
	for i, block := range blocks {
		t.Run(fmt.Sprint("block ", i+1), func(t *testing.T) {
			w := newWorld(t)
			s := w.start(cheap)
			// One shell, so that variables last; each step's output ends with a
			// mark that no output has.
			const mark = "--end of step--"
			var script strings.Builder
			for _, step := range block {
				fmt.Fprintf(&script, "%s\necho '%s'$?\n", strings.ReplaceAll(step.command, documented, s.base), mark)
			}
			cmd := exec.Command("bash", "-u")
			cmd.Stdin = strings.NewReader(script.String())
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			curls, rest := 0, out.String()
			for _, step := range block {
				if strings.Contains(step.command, documented) {
					curls++
				}
				got, after, ok := strings.Cut(rest, mark)
				if !ok {
					t.Fatalf("$ %s\ndid not come to its end: %s", step.command, rest)
				}
				code, after, _ := strings.Cut(after, "\n")
				rest = after
				if code != "0" {
					t.Errorf("$ %s\nexit code %s", step.command, code)
				}
				if !step.pattern().MatchString(got) {
					t.Errorf("$ %s\ngot\n%s\nwant\n%s", step.command, got, step.output)
				}
			}
			if curls == 0 {
				t.Errorf("no command asks %s", documented)
			}
		})
	}
}

// TestReadmeReader: the reader of sessions notices what differs.
func TestReadmeReader(t *testing.T) {
	blocks := sessions("text\n```console\n$ echo a\na\n$ echo b \\\n  c\nb...d\n```\n```go\n$x\n```\n")
	if len(blocks) != 1 || len(blocks[0]) != 2 || blocks[0][1].command != "echo b \\\n  c" {
		t.Fatalf("got %q", blocks)
	}
	for output, want := range map[string]bool{"b c d\n": true, "bd\n": false, "b c d": false, "b c d\n\n": false, "b\nd\n": false, "xb c d\n": false} {
		if got := blocks[0][1].pattern().MatchString(output); got != want {
			t.Errorf("%q: got %v, want %v", output, got, want)
		}
	}
}

// The Go examples of README.md compile, against this checkout and the client
// libraries they name.
func TestReadmeExamplesCompile(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, part := range strings.Split(string(readme), "```go\n")[1:] {
		code, _, _ := strings.Cut(part, "```")
		dir, err := os.MkdirTemp(".", "readme-example-") // inside the module, for its dependencies
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := os.WriteFile(filepath.Join(dir, "example.go"), []byte(code), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("go", "vet", "./"+dir).CombinedOutput(); err != nil {
			t.Errorf("example %d: %v\n%s", found+1, err, out)
		}
		found++
	}
	if found < 2 {
		t.Errorf("%d examples, want those of verifying tokens and consuming events", found)
	}
}
