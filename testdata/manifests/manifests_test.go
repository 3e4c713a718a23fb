// Package manifests holds deploy/kubernetes against the published schemas of
// Kubernetes and of the Prometheus operator, and against Kubernetes' own
// implementation of the Pod Security Standards. It needs no cluster.
package manifests

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	yamlreader "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kubectl-validate/pkg/openapiclient"
	"sigs.k8s.io/kubectl-validate/pkg/validator"
	"sigs.k8s.io/yaml"
)

const folder = "../../deploy/kubernetes"

// versions are the oldest and the newest Kubernetes that the manifests are for.
var versions = []string{"1.30", "1.35"}

// document is one object of one file.
type document struct {
	file string
	kind string
	text []byte
}

func documents(t *testing.T) (all []document) {
	t.Helper()
	files, err := filepath.Glob(folder + "/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		reader := yamlreader.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
		for {
			one, err := reader.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			var meta metav1.TypeMeta
			if err := yaml.Unmarshal(one, &meta); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			all = append(all, document{filepath.Base(file), meta.Kind, one})
		}
	}
	if len(all) < 9 {
		t.Fatalf("got %d objects in %s, want all of them", len(all), folder)
	}
	return all
}

// check holds one object against the schemas of a Kubernetes version. What
// Kubernetes itself does not define is decoded strictly into its owner's type.
func check(t *testing.T, version string, d document) error {
	t.Helper()
	switch d.kind {
	case "ServiceMonitor":
		return yaml.UnmarshalStrict(d.text, &monitoring.ServiceMonitor{})
	case "Kustomization":
		return yaml.UnmarshalStrict(d.text, &kustomization{})
	}
	schemas, err := validator.New(openapiclient.NewOverlay(
		openapiclient.HardcodedPatchLoader(version), openapiclient.NewHardcodedBuiltins(version)))
	if err != nil {
		t.Fatal(err)
	}
	_, object, err := schemas.Parse(d.text)
	if err != nil {
		return err
	}
	if object.GetGenerateName() != "" { // the API server makes the name
		object.SetName(object.GetGenerateName() + "x")
	}
	return schemas.Validate(object)
}

// kustomization is as much of the format as kustomization.yaml uses.
type kustomization struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Namespace  string   `json:"namespace"`
	Resources  []string `json:"resources"`
	Images     []struct {
		Name   string `json:"name"`
		NewTag string `json:"newTag"`
	} `json:"images"`
}

func TestSchemas(t *testing.T) {
	for _, version := range versions {
		for _, d := range documents(t) {
			if err := check(t, version, d); err != nil {
				t.Errorf("Kubernetes %s: %s: %s: %v", version, d.file, d.kind, err)
			}
		}
	}
}

// TestMistakesAreRefused: the check above means something. Each row makes one
// mistake in a manifest that is right.
func TestMistakesAreRefused(t *testing.T) {
	for _, row := range []struct{ kind, good, bad string }{
		{"Deployment", "readinessProbe:", "readynessProbe:"},
		{"Deployment", "readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"},
		{"Deployment", "periodSeconds: 10", "periodSeconds: ten"},
		{"Deployment", "replicas: 3", "replicas: \"3\""},
		{"Deployment", "type: RollingUpdate", "type: [RollingUpdate]"},
		{"Deployment", "secretName: identity-auth", "secret: identity-auth"},
		{"Deployment", "kind: Deployment", "kind: Deploymint"},
		{"Job", "backoffLimit:", "backOffLimit:"},
		{"Job", "restartPolicy: Never", "restart: Never"},
		{"Service", "targetPort:", "targetport:"},
		{"NetworkPolicy", "namespaceSelector:", "nameSpaceSelector:"},
		{"NetworkPolicy", "policyTypes:", "policyType:"},
		{"PodDisruptionBudget", "maxUnavailable:", "maxUnavailble:"},
		{"ServiceMonitor", "jobLabel:", "joblabels:"},
		{"ServiceMonitor", "interval: 15s", "intervall: 15s"},
		{"Kustomization", "resources:", "resource:"},
	} {
		found := false
		for _, d := range documents(t) {
			if d.kind != row.kind || found {
				continue
			}
			found = true
			text := bytes.Replace(d.text, []byte(row.good), []byte(row.bad), 1)
			if bytes.Equal(text, d.text) {
				t.Errorf("%s: %q does not stand in %s", row.kind, row.good, d.file)
				continue
			}
			for _, version := range versions {
				if check(t, version, document{d.file, d.kind, text}) == nil {
					t.Errorf("Kubernetes %s: %s with %q in place of %q: accepted, want refused", version, d.file, row.bad, row.good)
				}
			}
		}
		if !found {
			t.Errorf("there is no %s", row.kind)
		}
	}
}

// decode returns the only object of a kind.
func decode[T any](t *testing.T, kind string) T {
	t.Helper()
	var object T
	n := 0
	for _, d := range documents(t) {
		if d.kind == kind {
			n++
			if err := yaml.UnmarshalStrict(d.text, &object); err != nil {
				t.Fatalf("%s: %v", d.file, err)
			}
		}
	}
	if n != 1 {
		t.Fatalf("got %d objects of kind %s, want 1", n, kind)
	}
	return object
}

// pods are the two kinds of pods that are made.
func pods(t *testing.T) map[string]corev1.PodTemplateSpec {
	t.Helper()
	return map[string]corev1.PodTemplateSpec{
		"Deployment": decode[appsv1.Deployment](t, "Deployment").Spec.Template,
		"Job":        decode[batchv1.Job](t, "Job").Spec.Template,
	}
}

// TestPodSecurity asks the code that the API server itself decides with.
func TestPodSecurity(t *testing.T) {
	namespace := decode[corev1.Namespace](t, "Namespace")
	if got := namespace.Labels[api.EnforceLevelLabel]; got != string(api.LevelRestricted) {
		t.Errorf("%s: got %q, want %q", api.EnforceLevelLabel, got, api.LevelRestricted)
	}
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	level := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	for kind, pod := range pods(t) {
		results := evaluator.EvaluatePod(level, &pod.ObjectMeta, &pod.Spec)
		if len(results) == 0 {
			t.Fatal("no check of the restricted standard ran")
		}
		for _, r := range results {
			if !r.Allowed {
				t.Errorf("%s: %s: %s", kind, r.ForbiddenReason, r.ForbiddenDetail)
			}
		}
	}
	// The same code refuses what is loosened.
	loose := pods(t)["Deployment"]
	loose.Spec.SecurityContext.RunAsNonRoot = nil
	if policy.AggregateCheckResults(evaluator.EvaluatePod(level, &loose.ObjectMeta, &loose.Spec)).Allowed {
		t.Error("a pod without runAsNonRoot was allowed, want refused")
	}
}

// TestPods: what the standard above leaves open.
func TestPods(t *testing.T) {
	for kind, pod := range pods(t) {
		spec := pod.Spec
		if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
			t.Errorf("%s: a service account's token is mounted", kind)
		}
		if spec.SecurityContext.RunAsUser == nil || *spec.SecurityContext.RunAsUser != 65532 {
			t.Errorf("%s: runAsUser is not 65532", kind)
		}
		for _, c := range spec.Containers {
			if c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
				t.Errorf("%s: %s can write to its root", kind, c.Name)
			}
			if c.Resources.Requests.Memory().Cmp(*c.Resources.Limits.Memory()) != 0 {
				t.Errorf("%s: memory: requests %v, limit %v, want the same", kind, c.Resources.Requests.Memory(), c.Resources.Limits.Memory())
			}
			for _, m := range c.VolumeMounts {
				if !m.ReadOnly || m.SubPath != "" {
					t.Errorf("%s: %s: mounted to be written, or by subPath, which never changes", kind, m.MountPath)
				}
			}
			for _, v := range c.Env { // a secret in the environment is shown by describe
				if v.ValueFrom != nil {
					t.Errorf("%s: %s has a valueFrom, want a file", kind, v.Name)
				}
			}
		}
		for _, v := range spec.Volumes {
			// Root owns the files; the process is in their group only.
			if v.Secret == nil || *v.Secret.DefaultMode != 0o440 || spec.SecurityContext.FSGroup == nil || *spec.SecurityContext.FSGroup != 65532 {
				t.Errorf("%s: volume %s is no secret that user 65532, and nobody else, can read", kind, v.Name)
			}
		}
	}
}

func settings(c corev1.Container) map[string]string {
	all := map[string]string{}
	for _, v := range c.Env {
		all[v.Name] = v.Value
	}
	return all
}

// TestNumbersAddUp: the numbers of the deployment that follow from each other.
func TestNumbersAddUp(t *testing.T) {
	d := decode[appsv1.Deployment](t, "Deployment")
	pod := d.Spec.Template.Spec
	env := settings(pod.Containers[0])
	seconds := func(name string) time.Duration {
		v, err := time.ParseDuration(env[name])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return v
	}
	number := func(name string) int64 {
		n, err := strconv.ParseInt(env[name], 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	const flush = 5 * time.Second // of the outbox, after the requests have drained
	grace := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second
	if least := seconds("SHUTDOWN_DELAY") + seconds("SHUTDOWN_TIMEOUT") + flush; grace <= least {
		t.Errorf("terminationGracePeriodSeconds: got %v, want more than %v", grace, least)
	}
	if got := seconds("SHUTDOWN_TIMEOUT"); got <= 10*time.Second {
		t.Errorf("SHUTDOWN_TIMEOUT: got %v, want more than the 10 s of a request", got)
	}
	slots := number("MAX_CONCURRENT_HASHES")
	need, limit := slots*64<<20+64<<20, pod.Containers[0].Resources.Limits.Memory().Value()
	if limit < need*5/4 {
		t.Errorf("memory limit: got %d MiB, want %d MiB and a quarter more", limit>>20, need>>20)
	}
	if cpus := pod.Containers[0].Resources.Requests.Cpu().Value(); cpus < slots {
		t.Errorf("requests %d CPUs for %d hash slots", cpus, slots)
	}
	// The figure in the comment, below PostgreSQL's default of 100 with room for others.
	if got := (int64(*d.Spec.Replicas) + int64(d.Spec.Strategy.RollingUpdate.MaxSurge.IntValue())) * (number("DATABASE_MAX_CONNECTIONS") + 1); got != 68 {
		t.Errorf("connections: got %d, and the comment says 68", got)
	}
	if d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue() != 0 || *d.Spec.Replicas < 3 {
		t.Errorf("got %d replicas and maxUnavailable %v, want 3 and 0", *d.Spec.Replicas, d.Spec.Strategy.RollingUpdate.MaxUnavailable)
	}
	if env["MIGRATE_ON_START"] != "false" {
		t.Error("the deployment migrates by itself, beside the job")
	}
	if _, ok := env["ADMIN_TOKEN_FILE"]; ok {
		t.Error("the admin listener is open to other pods with operations on accounts")
	}
}

// TestProbes: those of RUNBOOK.md, section 2, which has them for operators to copy.
func TestProbes(t *testing.T) {
	text, err := os.ReadFile("../../RUNBOOK.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n# 2. Health checks\n")
	_, block, _ := strings.Cut(section, "```yaml\n")
	block, _, found := strings.Cut(block, "```")
	var want struct {
		ReadinessProbe, LivenessProbe corev1.Probe
	}
	if err := yaml.UnmarshalStrict([]byte(block), &want); err != nil || !found {
		t.Fatalf("the probes of RUNBOOK.md, section 2: %v", err)
	}
	c := decode[appsv1.Deployment](t, "Deployment").Spec.Template.Spec.Containers[0]
	for name, probes := range map[string][2]*corev1.Probe{"readiness": {c.ReadinessProbe, &want.ReadinessProbe}, "liveness": {c.LivenessProbe, &want.LivenessProbe}} {
		got, want := probes[0], probes[1]
		if got.HTTPGet.Path != want.HTTPGet.Path || got.HTTPGet.Port != want.HTTPGet.Port || want.HTTPGet.Port.IntValue() != 8080 {
			t.Errorf("%s: got %v %v, want %v %v", name, got.HTTPGet.Path, got.HTTPGet.Port, want.HTTPGet.Path, want.HTTPGet.Port)
		}
		if want.PeriodSeconds != 0 && (got.PeriodSeconds != want.PeriodSeconds || got.InitialDelaySeconds != want.InitialDelaySeconds) {
			t.Errorf("%s: got period %d and delay %d, want %d and %d", name, got.PeriodSeconds, got.InitialDelaySeconds, want.PeriodSeconds, want.InitialDelaySeconds)
		}
	}
}

// TestSelectors: what refers to something by labels finds it, and nothing else.
func TestSelectors(t *testing.T) {
	made := pods(t)
	service, job := labels.Set(made["Deployment"].Labels), labels.Set(made["Job"].Labels)
	pdb := decode[policyv1.PodDisruptionBudget](t, "PodDisruptionBudget")
	netpol := decode[networkingv1.NetworkPolicy](t, "NetworkPolicy")
	deployment := decode[appsv1.Deployment](t, "Deployment")
	for _, row := range []struct {
		name         string
		selector     *metav1.LabelSelector
		service, job bool
	}{
		{"deployment", deployment.Spec.Selector, true, false},
		{"disruption budget", pdb.Spec.Selector, true, false},
		{"network policy", &netpol.Spec.PodSelector, true, true},
		{"topology spread", deployment.Spec.Template.Spec.TopologySpreadConstraints[0].LabelSelector, true, false},
		{"topology spread", deployment.Spec.Template.Spec.TopologySpreadConstraints[1].LabelSelector, true, false},
	} {
		selector, err := metav1.LabelSelectorAsSelector(row.selector)
		if err != nil {
			t.Fatal(err)
		}
		if selector.Matches(service) != row.service || selector.Matches(job) != row.job {
			t.Errorf("%s: selects the service's pods %t, the job's %t, want %t and %t", row.name, selector.Matches(service), selector.Matches(job), row.service, row.job)
		}
	}
	var ports []string
	for _, p := range deployment.Spec.Template.Spec.Containers[0].Ports {
		ports = append(ports, p.Name)
	}
	monitor := decode[monitoring.ServiceMonitor](t, "ServiceMonitor")
	monitored := 0
	for _, d := range documents(t) {
		if d.kind != "Service" {
			continue
		}
		var s corev1.Service
		if err := yaml.UnmarshalStrict(d.text, &s); err != nil {
			t.Fatal(err)
		}
		selector := labels.SelectorFromSet(s.Spec.Selector)
		if !selector.Matches(service) || selector.Matches(job) || !slices.Contains(ports, s.Spec.Ports[0].TargetPort.String()) {
			t.Errorf("service %s: does not lead to a port of the service's pods", s.Name)
		}
		if scraped, _ := metav1.LabelSelectorAsSelector(&monitor.Spec.Selector); scraped.Matches(labels.Set(s.Labels)) {
			monitored++
			if s.Spec.Ports[0].Name != monitor.Spec.Endpoints[0].Port || s.Spec.Ports[0].TargetPort.String() != "admin" {
				t.Errorf("service %s: its port %s is not the admin listener that is scraped", s.Name, s.Spec.Ports[0].Name)
			}
			if got := s.Labels[monitor.Spec.JobLabel]; got != "identity-auth" {
				t.Errorf("job label: got %q, want identity-auth, which the rules go by", got)
			}
		}
	}
	if monitored != 1 {
		t.Errorf("the ServiceMonitor selects %d services, want 1", monitored)
	}
	// Everything that kustomization.yaml leaves out is the job.
	k := decode[kustomization](t, "Kustomization")
	for _, d := range documents(t) {
		if listed := slices.Contains(k.Resources, d.file); listed == (d.kind == "Job" || d.kind == "Kustomization") {
			t.Errorf("kustomization.yaml: %s listed: %t", d.file, listed)
		}
	}
}

// TestNetworkPolicy: each way in and out names its port and its peer.
func TestNetworkPolicy(t *testing.T) {
	spec := decode[networkingv1.NetworkPolicy](t, "NetworkPolicy").Spec
	if want := []networkingv1.PolicyType{"Ingress", "Egress"}; !slices.Equal(spec.PolicyTypes, want) {
		t.Errorf("policyTypes: got %v, want %v", spec.PolicyTypes, want)
	}
	var in, out []int
	hold := func(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) (numbers []int) {
		if len(peers) == 0 || len(ports) == 0 { // that would be all of them
			t.Error("a rule without peer or port")
		}
		for _, p := range peers {
			if p.NamespaceSelector == nil || len(p.NamespaceSelector.MatchLabels) == 0 {
				t.Error("a peer that is not bound to a namespace")
			}
		}
		for _, p := range ports {
			numbers = append(numbers, p.Port.IntValue())
		}
		return numbers
	}
	for _, r := range spec.Ingress {
		in = append(in, hold(r.From, r.Ports)...)
	}
	for _, r := range spec.Egress {
		out = append(out, hold(r.To, r.Ports)...)
	}
	if !slices.Equal(in, []int{8080, 9090}) || !slices.Equal(out, []int{53, 53, 5432, 4222}) {
		t.Errorf("ports: got in %v and out %v, want 8080, 9090 and DNS, PostgreSQL, NATS", in, out)
	}
}
