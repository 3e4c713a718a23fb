// Command release writes what goes along with released binaries: an SBOM
// (CycloneDX 1.6) and the licences of everything that is linked. It asks the
// binaries themselves what that is.
//
//	release VERSION OUT BINARY...
//
// It runs in the folder of the module that was built.
package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 4 {
		log.Fatal("usage: release VERSION OUT BINARY...")
	}
	if err := write(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		log.Fatal("release: ", err)
	}
}

// module is one that is linked, or the one that was built.
type module struct {
	path, version, sum string
	dir                string
	packages           []string        // their folders
	uses               map[string]bool // paths of modules
	files              map[string][]byte
	licenses           []string // SPDX ids
}

func write(version, out string, binaries []string) error {
	var root *module
	var linked map[string]*module
	for _, binary := range binaries {
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			return err
		}
		r, modules, err := modulesOf(info)
		if err != nil {
			return fmt.Errorf("%s: %w", binary, err)
		}
		if linked == nil {
			root, linked = r, modules
		}
		if !slices.Equal(names(linked), names(modules)) {
			return fmt.Errorf("%s is made of other modules than %s: one SBOM cannot tell of both", binary, binaries[0])
		}
	}
	root.version = version
	var errs []error
	for _, path := range slices.Sorted(maps.Keys(linked)) {
		errs = append(errs, linked[path].readLicenses())
	}
	errs = append(errs, root.readLicenses())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	sbom, err := cycloneDX(root, linked)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "identity-auth-"+version+".cdx.json"), sbom, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "LICENSES"), licenseText(root, linked), 0o644)
}

func (m *module) name() string { return m.path + "@" + m.version }

// purl is the package URL, by which scanners look modules up.
func (m *module) purl() string {
	return "pkg:golang/" + strings.ToLower(m.path) + "@" + url.QueryEscape(m.version)
}

func names(modules map[string]*module) []string {
	var list []string
	for _, m := range modules {
		list = append(list, m.name())
	}
	slices.Sort(list)
	return list
}

// modulesOf returns the modules that a binary names as its own, std among them,
// with the folders of the packages that are linked.
func modulesOf(info *buildinfo.BuildInfo) (*module, map[string]*module, error) {
	root := &module{path: info.Main.Path, uses: map[string]bool{}}
	linked := map[string]*module{"std": {path: "std", version: strings.TrimPrefix(info.GoVersion, "go"), uses: map[string]bool{}}}
	for _, dep := range info.Deps {
		if dep.Replace != nil {
			return nil, nil, fmt.Errorf("%s is replaced", dep.Path)
		}
		linked[dep.Path] = &module{path: dep.Path, version: dep.Version, sum: dep.Sum, uses: map[string]bool{}}
	}
	list := exec.Command("go", "list", "-deps", "-json=ImportPath,Dir,Standard,Imports,ImportMap,Module", ".")
	list.Stderr = os.Stderr
	list.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+setting(info, "GOOS"), "GOARCH="+setting(info, "GOARCH"))
	out, err := list.Output()
	if err != nil {
		return nil, nil, fmt.Errorf("go list: %w", err)
	}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("go env: %w", err)
	}
	linked["std"].dir = strings.TrimSpace(string(goroot))

	owner := map[string]*module{} // of each package; dependencies are listed first
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath, Dir string
			Standard        bool
			Imports         []string
			ImportMap       map[string]string
			Module          *struct{ Path, Version, Dir string }
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, nil, err
		}
		var m *module
		switch {
		case p.Standard:
			owner[p.ImportPath] = linked["std"]
			continue
		case p.Module.Path == root.path:
			m = root
		case linked[p.Module.Path] != nil && linked[p.Module.Path].version == p.Module.Version:
			m = linked[p.Module.Path]
		default:
			return nil, nil, fmt.Errorf("it was not built from these sources: they use %s@%s", p.Module.Path, p.Module.Version)
		}
		m.dir = p.Module.Dir
		m.packages = append(m.packages, p.Dir)
		owner[p.ImportPath] = m
		for _, imported := range p.Imports {
			if mapped := p.ImportMap[imported]; mapped != "" {
				imported = mapped
			}
			if used := owner[imported]; used != nil && used != m {
				m.uses[used.path] = true
			}
		}
	}
	for _, m := range linked {
		if m.dir == "" {
			return nil, nil, fmt.Errorf("it was not built from these sources: they do not use %s", m.name())
		}
	}
	return root, linked, nil
}

func setting(info *debug.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

var licenseFile = regexp.MustCompile(`(?i)^(licen[sc]e|copying|notice|patents)([.-](txt|md|[a-z0-9]+))?$`)

// readLicenses reads the licence files of the module, and those beside and above
// its linked packages: code taken from elsewhere has its own.
func (m *module) readLicenses() error {
	m.files = map[string][]byte{}
	dirs := map[string]bool{m.dir: true}
	for _, dir := range m.packages {
		for ; strings.HasPrefix(dir, m.dir+string(filepath.Separator)); dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	for dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !e.Type().IsRegular() || !licenseFile.MatchString(e.Name()) || strings.HasSuffix(e.Name(), ".go") {
				continue
			}
			file := filepath.Join(dir, e.Name())
			name, err := filepath.Rel(m.dir, file)
			if err != nil {
				return err
			}
			if m.files[name], err = os.ReadFile(file); err != nil {
				return err
			}
		}
	}
	if m.path == "std" && len(m.files) == 0 {
		// Debian keeps it elsewhere.
		found, _ := filepath.Glob("/usr/share/doc/golang-" + strings.TrimPrefix(filepath.Base(m.dir), "go-") + "-*/copyright")
		for _, file := range found {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			m.files["copyright"] = text
		}
	}
	found := map[string]bool{}
	for _, text := range m.files {
		for _, id := range identify(string(text)) {
			found[id] = true
		}
	}
	m.licenses = slices.Sorted(maps.Keys(found))
	if len(m.licenses) == 0 {
		return fmt.Errorf("%s has no licence file, or one that is not known here: look at %s", m.name(), m.dir)
	}
	return nil
}

// identify names the licences that a text contains.
func identify(text string) (ids []string) {
	text = strings.Join(strings.Fields(text), " ")
	has := func(phrase string) bool { return strings.Contains(text, phrase) }
	if has("Apache License") && has("Version 2.0") {
		ids = append(ids, "Apache-2.0")
	}
	if has("Permission is hereby granted, free of charge, to any person obtaining a copy") {
		ids = append(ids, "MIT")
	}
	if has("Redistribution and use in source and binary forms") {
		if has("Neither the name") || has("names of its contributors") {
			ids = append(ids, "BSD-3-Clause")
		} else {
			ids = append(ids, "BSD-2-Clause")
		}
	}
	return ids
}

func licenseText(root *module, linked map[string]*module) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "identity-auth %s is linked from the modules below. These are their licences.\n", root.version)
	for _, m := range append([]*module{root}, sorted(linked)...) {
		for _, name := range slices.Sorted(maps.Keys(m.files)) {
			fmt.Fprintf(&b, "\n%s\n%s, %s\n%[1]s\n\n%s\n", strings.Repeat("=", 80), m.name(), name, bytes.TrimSpace(m.files[name]))
		}
	}
	return b.Bytes()
}

func sorted(linked map[string]*module) (list []*module) {
	for _, path := range slices.Sorted(maps.Keys(linked)) {
		list = append(list, linked[path])
	}
	return list
}

type object = map[string]any

func (m *module) component(kind string) object {
	licenses := []object{}
	for _, id := range m.licenses {
		licenses = append(licenses, object{"license": object{"id": id}})
	}
	c := object{"type": kind, "bom-ref": m.purl(), "name": m.path, "version": m.version, "purl": m.purl(), "licenses": licenses}
	if m.sum != "" { // of the module's files, as in go.sum; not the hash of one file
		c["properties"] = []object{{"name": "go:sum", "value": m.sum}}
	}
	return c
}

// cycloneDX is the same for the same modules: no time, and a serial number that
// follows from the rest.
func cycloneDX(root *module, linked map[string]*module) ([]byte, error) {
	components, dependencies := []object{}, []object{}
	for _, m := range append([]*module{root}, sorted(linked)...) {
		uses := []string{}
		for path := range m.uses {
			uses = append(uses, linked[path].purl())
		}
		if m.path != "std" {
			uses = append(uses, linked["std"].purl())
		}
		slices.Sort(uses)
		dependencies = append(dependencies, object{"ref": m.purl(), "dependsOn": slices.Compact(uses)})
		if m != root {
			components = append(components, m.component("library"))
		}
	}
	bom := object{
		"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
		"metadata":   object{"component": root.component("application")},
		"components": components, "dependencies": dependencies,
	}
	content, err := json.Marshal(bom)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(content)
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // RFC 9562 5.8: made in our own way
	bom["serialNumber"] = fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:16])
	text, err := json.MarshalIndent(bom, "", "  ")
	return append(text, '\n'), err
}
