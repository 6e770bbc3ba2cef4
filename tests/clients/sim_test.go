// Package clients runs Proxmox clients that others have written against a pve-sim process.
package clients

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const world = `
nodes: [pve1, pve2]
storages:
- {id: local, content: "images,iso,vztmpl,snippets"}
- {id: shared, shared: true, content: "images,iso"}
vms:
- vmid: 9000
  node: pve1
  name: image
  running: false
  config:
    scsi0: "shared:9000/vm-9000-disk-0.raw,size=2G"
    agent: "1"
    tags: "capi;debian"
    net0: "virtio=BC:24:11:00:00:01,bridge=vmbr0"
    ide2: "none,media=cdrom"
tokens:
- {id: root@pam!clients, secret: 11111111-2222-4333-8444-555555555555}
- {id: capmox@pve!clients, secret: 11111111-2222-4333-8444-555555555556}
- {id: csi@pve!csi, secret: 11111111-2222-4333-8444-555555555557}
roles:
  CSI: [VM.Audit, VM.Config.Disk, Datastore.Allocate, Datastore.AllocateSpace, Datastore.Audit]
users: {root@pam: secret-of-root}
pools: [capi]
acl:
- {path: /, who: csi@pve, role: CSI}
- {path: /, who: capmox@pve, role: PVEAuditor}
- {path: /vms, who: capmox@pve, role: PVEVMAdmin}
- {path: /storage, who: capmox@pve, role: PVEDatastoreAdmin}
- {path: /nodes, who: capmox@pve, role: PVESysAdmin}
- {path: /pool, who: capmox@pve, role: PVEPoolAdmin}
`

const (
	tokenID     = "root@pam!clients"
	tokenSecret = "11111111-2222-4333-8444-555555555555"
	password    = "secret-of-root"
)

// sim is a running pve-sim.
type sim struct {
	t    *testing.T
	URL  string
	CA   string
	http *http.Client
}

// start runs a pve-sim that ends with the test, and fails the test if a call was not modelled.
func start(t *testing.T, arguments ...string) *sim {
	t.Helper()
	binary := os.Getenv("PVE_SIM")
	if binary == "" {
		binary = "../../target/debug/pve-sim"
	}
	directory := t.TempDir()
	worldFile := filepath.Join(directory, "world.yaml")
	if err := os.WriteFile(worldFile, []byte(world), 0o600); err != nil {
		t.Fatal(err)
	}
	arguments = append([]string{"serve", "--time", "none", "--world", worldFile, "--state", filepath.Join(directory, "state")}, arguments...)
	command := exec.Command(binary, arguments...)
	command.Stderr = os.Stderr
	command.Env = append(os.Environ(), "RUST_LOG=warn")
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatalf("%s: %v (build it with `cargo build --bin pve-sim`)", binary, err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		t.Fatalf("pve-sim says nothing: %v", err)
	}
	var said struct{ URL, CA string }
	if err := json.Unmarshal(line, &said); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(said.CA)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	s := &sim{t: t, URL: said.URL, CA: said.CA, http: client}
	t.Cleanup(func() {
		if unmodelled := s.state()["unmodelled"].(map[string]any); len(unmodelled) > 0 {
			t.Errorf("calls that pve-sim does not model: %v", unmodelled)
		}
	})
	return s
}

// state is what GET /_sim/state answers.
func (s *sim) state() map[string]any {
	s.t.Helper()
	response, err := s.http.Get(s.URL + "/_sim/state")
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	var state map[string]any
	if err := json.NewDecoder(response.Body).Decode(&state); err != nil {
		s.t.Fatal(err)
	}
	return state
}

// calls are the requests that pve-sim has answered, as `METHOD PATH`.
func (s *sim) calls() []string {
	s.t.Helper()
	response, err := s.http.Get(s.URL + "/_sim/log")
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	var entries []struct{ Method, Path string }
	if err := json.NewDecoder(response.Body).Decode(&entries); err != nil {
		s.t.Fatal(err)
	}
	var calls []string
	for _, entry := range entries {
		calls = append(calls, entry.Method+" "+strings.TrimPrefix(entry.Path, "/api2/json"))
	}
	return calls
}

// fault plays a fault.
func (s *sim) fault(fault map[string]any) {
	s.t.Helper()
	body, err := json.Marshal(fault)
	if err != nil {
		s.t.Fatal(err)
	}
	response, err := s.http.Post(s.URL+"/_sim/faults", "application/json", strings.NewReader(string(body)))
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(response.Body)
		s.t.Fatalf("%s", text)
	}
}

// volumes are the ids of all volumes.
func (s *sim) volumes() []string {
	var volids []string
	for _, volume := range s.state()["volumes"].([]any) {
		volids = append(volids, volume.(map[string]any)["volid"].(string))
	}
	return volids
}

// within is a context for one test.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
