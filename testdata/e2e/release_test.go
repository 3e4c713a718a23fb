package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestRelease: make release builds every binary twice alike, and what goes along
// with them is true of them.
func TestRelease(t *testing.T) {
	cmd := exec.Command("make", "-s", "release", "VERSION=v0.0.0-test", "COMMIT=0123456789abcdef")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make release: %v\n%s", err, out)
	}
	dir := "../../.bin/release"
	sums := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	sums.Dir = dir
	if out, err := sums.CombinedOutput(); err != nil {
		t.Errorf("SHA256SUMS: %v\n%s", err, out)
	}
	listed, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != "SHA256SUMS" && !strings.Contains(string(listed), " "+f.Name()+"\n") {
			t.Errorf("%s has no checksum", f.Name())
		}
	}

	binary := filepath.Join(dir, "identity-auth-v0.0.0-test-linux-"+runtime.GOARCH)
	version, err := exec.Command(binary, "version").Output()
	if want := "identity-auth v0.0.0-test commit 0123456789abcdef " + runtime.Version() + "\n"; err != nil || string(version) != want {
		t.Errorf("version: got %q %v, want %q", version, err, want)
	}

	out, err := exec.Command("go", "version", "-m", binary).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"std@" + strings.TrimPrefix(runtime.Version(), "go")}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "dep" {
			want = append(want, f[1]+"@"+f[2])
		}
	}
	slices.Sort(want)
	data, err := os.ReadFile(filepath.Join(dir, "identity-auth-v0.0.0-test.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var sbom struct {
		BOMFormat  string
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal(data, &sbom); err != nil || sbom.BOMFormat != "CycloneDX" {
		t.Fatalf("no CycloneDX document: %v", err)
	}
	var got []string
	for _, c := range sbom.Components {
		got = append(got, c.Name+"@"+c.Version)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("modules of the SBOM: got %v, want those linked: %v", got, want)
	}

	licenses, err := os.ReadFile(filepath.Join(dir, "LICENSES"))
	if err != nil {
		t.Fatal(err)
	}
	for _, module := range want {
		name, _, _ := strings.Cut(module, "@")
		if !bytes.Contains(licenses, []byte(name)) {
			t.Errorf("LICENSES lacks %s", name)
		}
	}
}
