package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/santhosh-tekuri/jsonschema/v6"
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
	checkCycloneDX(t, data)
	var sbom cyclonedx.BOM
	if err := cyclonedx.NewBOMDecoder(bytes.NewReader(data), cyclonedx.BOMFileFormatJSON).Decode(&sbom); err != nil {
		t.Fatal(err)
	}
	refs := []string{sbom.Metadata.Component.BOMRef}
	var got []string
	for _, c := range *sbom.Components {
		got = append(got, c.Name+"@"+c.Version)
		refs = append(refs, c.BOMRef)
		if c.Licenses == nil || len(*c.Licenses) == 0 {
			t.Errorf("SBOM: %s has no licence", c.Name)
		}
	}
	for _, d := range *sbom.Dependencies {
		for _, ref := range append([]string{d.Ref}, *d.Dependencies...) {
			if !slices.Contains(refs, ref) {
				t.Errorf("SBOM: %s is a dependency and no component", ref)
			}
		}
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

// checkCycloneDX holds a document against the published schema, which comes with
// the library that reads it.
func checkCycloneDX(t *testing.T, document []byte) {
	t.Helper()
	const site, schema = "http://cyclonedx.org/schema/", "bom-1.6.schema.json"
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	for name, file := range map[string]string{schema: schema, "spdx.schema.json": "spdx.schema.json", "jsf-0.82.schema.json": "jsf-0.82.schemax.json"} {
		text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "schema", file))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := compiler.AddResource(site+name, parsed); err != nil {
			t.Fatal(err)
		}
	}
	compiled, err := compiler.Compile(site + schema)
	if err != nil {
		t.Fatal(err)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	if err := compiled.Validate(value); err != nil {
		t.Errorf("not CycloneDX 1.6: %v", err)
	}
}
