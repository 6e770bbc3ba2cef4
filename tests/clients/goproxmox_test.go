package clients

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	proxmox "github.com/luthermonson/go-proxmox"
)

func client(s *sim, id, secret string) *proxmox.Client {
	return proxmox.NewClient(s.URL+"/api2/json", proxmox.WithHTTPClient(s.http), proxmox.WithAPIToken(id, secret))
}

// done waits for a task and fails unless it ended well.
func done(t *testing.T, ctx context.Context, what string, task *proxmox.Task, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if err := task.Wait(ctx, 50*time.Millisecond, 30*time.Second); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if task.IsFailed {
		t.Fatalf("%s: %s", what, task.ExitStatus)
	}
}

func must[T any](t *testing.T, what string) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		return value
	}
}

func TestGoProxmoxLogsInWithATicketAndRenewsIt(t *testing.T) {
	s, ctx := start(t), within(t)
	c := proxmox.NewClient(s.URL+"/api2/json", proxmox.WithHTTPClient(s.http),
		proxmox.WithCredentials(&proxmox.Credentials{Username: "root@pam", Password: password}))
	version := must[*proxmox.Version](t, "version")(c.Version(ctx))
	if version.Release != "9.2" {
		t.Fatalf("release %q", version.Release)
	}
	if err := c.RefreshTicket(ctx); err != nil {
		t.Fatalf("renewal: %v", err)
	}
	// A write takes the token against forged requests.
	if err := c.NewGroup(ctx, "ops", "operators"); err != nil {
		t.Fatalf("group: %v", err)
	}
	if group := must[*proxmox.Group](t, "group")(c.Group(ctx, "ops")); group.Comment != "operators" {
		t.Fatalf("comment %q", group.Comment)
	}
	wrong := proxmox.NewClient(s.URL+"/api2/json", proxmox.WithHTTPClient(s.http),
		proxmox.WithCredentials(&proxmox.Credentials{Username: "root@pam", Password: "wrong"}))
	if _, err := wrong.Version(ctx); err == nil {
		t.Fatal("a wrong password is taken")
	}
}

func TestGoProxmoxLivesThroughAVirtualMachine(t *testing.T) {
	s, ctx := start(t), within(t)
	c := client(s, tokenID, tokenSecret)
	cluster := must[*proxmox.Cluster](t, "cluster")(c.Cluster(ctx))
	id := must[int](t, "nextid")(cluster.NextID(ctx))
	node := must[*proxmox.Node](t, "node")(c.Node(ctx, "pve1"))

	task, err := node.NewVirtualMachine(ctx, id,
		proxmox.VirtualMachineOption{Name: "name", Value: "life"},
		proxmox.VirtualMachineOption{Name: "memory", Value: 1024},
		proxmox.VirtualMachineOption{Name: "scsihw", Value: "virtio-scsi-single"},
		proxmox.VirtualMachineOption{Name: "agent", Value: 1},
		proxmox.VirtualMachineOption{Name: "scsi0", Value: "shared:1"},
		proxmox.VirtualMachineOption{Name: "net0", Value: "virtio,bridge=vmbr0"},
		proxmox.VirtualMachineOption{Name: "ipconfig0", Value: "ip=192.0.2.7/24,gw=192.0.2.1"},
	)
	done(t, ctx, "create", task, err)
	vm := must[*proxmox.VirtualMachine](t, "vm")(node.VirtualMachine(ctx, id))
	if !strings.HasPrefix(vm.VirtualMachineConfig.SCSIs["scsi0"], fmt.Sprintf("shared:%d/vm-%d-disk-0.raw", id, id)) {
		t.Fatalf("scsi0: %q", vm.VirtualMachineConfig.SCSIs["scsi0"])
	}

	task, err = vm.Config(ctx, proxmox.VirtualMachineOption{Name: "description", Value: "of a test"})
	done(t, ctx, "config", task, err)
	task, err = vm.Start(ctx)
	done(t, ctx, "start", task, err)
	if err := vm.WaitForAgent(ctx, 5); err != nil {
		t.Fatalf("agent: %v", err)
	}
	interfaces := must[[]*proxmox.AgentNetworkIface](t, "interfaces")(vm.AgentGetNetworkIFaces(ctx))
	has := slices.ContainsFunc(interfaces, func(i *proxmox.AgentNetworkIface) bool {
		return slices.ContainsFunc(i.IPAddresses, func(a *proxmox.AgentNetworkIPAddress) bool { return a.IPAddress == "192.0.2.7" })
	})
	if !has {
		t.Fatal("the guest does not say its address")
	}
	s.fault(map[string]any{"fault": "agent_exec", "command": "uname", "out": "Linux\n"})
	pid := must[int](t, "exec")(vm.AgentExec(ctx, []string{"uname", "-s"}, ""))
	status := must[*proxmox.AgentExecStatus](t, "exec-status")(vm.WaitForAgentExecExit(ctx, pid, 5))
	if status.OutData != "Linux\n" || status.ExitCode != 0 {
		t.Fatalf("%+v", status)
	}
	if err := vm.AgentFileWrite(ctx, "/etc/motd", []byte("hello")); err != nil {
		t.Fatalf("file-write: %v", err)
	}
	if file := must[*proxmox.AgentFileRead](t, "file-read")(vm.AgentFileRead(ctx, "/etc/motd")); file.Content != "hello" {
		t.Fatalf("%q", file.Content)
	}

	task, err = vm.ResizeDisk(ctx, "scsi0", "+1G")
	done(t, ctx, "resize", task, err)
	task, err = vm.Migrate(ctx, &proxmox.VirtualMachineMigrateOptions{Target: "pve2", Online: true})
	done(t, ctx, "migrate", task, err)
	if _, err := node.VirtualMachine(ctx, id); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Fatalf("the old node still has it: %v", err)
	}
	two := must[*proxmox.Node](t, "node")(c.Node(ctx, "pve2"))
	vm = must[*proxmox.VirtualMachine](t, "vm")(two.VirtualMachine(ctx, id))
	if !strings.Contains(vm.VirtualMachineConfig.SCSIs["scsi0"], "size=2G") {
		t.Fatalf("scsi0: %q", vm.VirtualMachineConfig.SCSIs["scsi0"])
	}

	// A raw file has no snapshots; one in qcow2 has.
	task, err = vm.Config(ctx, proxmox.VirtualMachineOption{Name: "scsi1", Value: "shared:1,format=qcow2"})
	done(t, ctx, "second disk", task, err)
	if task, err = vm.NewSnapshot(ctx, "one"); err == nil {
		err = task.Wait(ctx, 50*time.Millisecond, 30*time.Second)
	}
	if err == nil && !task.IsFailed {
		t.Fatal("a raw disk has a snapshot")
	}
	task, err = vm.MoveDisk(ctx, "scsi0", &proxmox.VirtualMachineMoveDiskOptions{Disk: "scsi0", Storage: "shared", Format: "qcow2", Delete: true})
	done(t, ctx, "move disk", task, err)
	task, err = vm.NewSnapshot(ctx, "one")
	done(t, ctx, "snapshot", task, err)
	snapshots := must[[]*proxmox.VirtualMachineSnapshot](t, "snapshots")(vm.Snapshots(ctx))
	if len(snapshots) != 2 || snapshots[0].Name != "one" {
		t.Fatalf("%+v", snapshots)
	}

	task, err = vm.Reboot(ctx)
	done(t, ctx, "reboot", task, err)
	task, err = vm.Stop(ctx)
	done(t, ctx, "stop", task, err)
	task, err = vm.Delete(ctx, nil)
	done(t, ctx, "destroy", task, err)
	if !must[bool](t, "free")(cluster.CheckID(ctx, id)) {
		t.Fatal("the id is not free")
	}
	if left := s.volumes(); len(left) != 1 {
		t.Fatalf("volumes are left: %v", left)
	}
	tasks := must[proxmox.Tasks](t, "tasks")(cluster.Tasks(ctx))
	if len(tasks) < 8 {
		t.Fatalf("%d tasks", len(tasks))
	}
}

// The calls of ionos-cloud/cluster-api-provider-proxmox for a machine that comes and goes, in its order.
func TestCapmoxCreatesAndDeletesAMachine(t *testing.T) {
	s, ctx := start(t), within(t)
	root := client(s, tokenID, tokenSecret)
	image := must[*proxmox.VirtualMachine](t, "image")((&proxmox.Node{}).New(root, "pve1").VirtualMachine(ctx, 9000))
	task, err := image.ConvertToTemplate(ctx)
	done(t, ctx, "template", task, err)

	// newAPIClient
	c := client(s, "capmox@pve!clients", "11111111-2222-4333-8444-555555555556")
	must[*proxmox.Version](t, "version")(c.Version(ctx))
	before := len(s.calls())

	// GetReservableMemoryBytes: the scheduler looks at each node.
	for _, name := range []string{"pve1", "pve2"} {
		node := (&proxmox.Node{}).New(c, name)
		if err := node.Status(ctx); err != nil {
			t.Fatalf("status of %s: %v", name, err)
		}
		must[proxmox.VirtualMachines](t, "vms")(node.VirtualMachines(ctx))
		must[proxmox.Containers](t, "containers")(node.Containers(ctx))
	}
	// FindVMTemplateByTags
	cluster := must[*proxmox.Cluster](t, "cluster")(c.Cluster(ctx))
	var template *proxmox.ClusterResource
	for _, resource := range must[proxmox.ClusterResources](t, "resources")(cluster.Resources(ctx, "vm")) {
		if resource.Template == 1 && resource.Tags == "capi;debian" {
			template = resource
		}
	}
	if template == nil || template.VMID != 9000 {
		t.Fatalf("no template: %+v", template)
	}
	// CloneVM
	node := (&proxmox.Node{}).New(c, template.Node)
	if err := node.Status(ctx); err != nil {
		t.Fatal(err)
	}
	source := must[*proxmox.VirtualMachine](t, "template")(node.VirtualMachine(ctx, 9000))
	id, task, err := source.Clone(ctx, &proxmox.VirtualMachineCloneOptions{
		Name: "worker-1", Description: "machine", Full: true, Pool: "capi", Target: "pve2", Storage: "shared",
	})
	done(t, ctx, "clone", task, err)

	get := func() *proxmox.VirtualMachine {
		t.Helper()
		node := (&proxmox.Node{}).New(c, "pve2")
		if err := node.Status(ctx); err != nil {
			t.Fatal(err)
		}
		return must[*proxmox.VirtualMachine](t, "machine")(node.VirtualMachine(ctx, id))
	}
	vm := get()
	if vm.Name != "worker-1" || !strings.Contains(vm.VirtualMachineConfig.SMBios1, "uuid=") {
		t.Fatalf("%q %q", vm.Name, vm.VirtualMachineConfig.SMBios1)
	}
	if vm.VirtualMachineConfig.SMBios1 == source.VirtualMachineConfig.SMBios1 {
		t.Fatal("a clone has the uuid of its source")
	}
	// reconcileVirtualMachineConfig
	task, err = vm.Config(ctx,
		proxmox.VirtualMachineOption{Name: "sockets", Value: 1},
		proxmox.VirtualMachineOption{Name: "cores", Value: 2},
		proxmox.VirtualMachineOption{Name: "memory", Value: 4096},
		proxmox.VirtualMachineOption{Name: "description", Value: "machine"},
		proxmox.VirtualMachineOption{Name: "net0", Value: "virtio,bridge=vmbr0,firewall=0"},
		proxmox.VirtualMachineOption{Name: "tags", Value: "capi;debian;worker"},
	)
	done(t, ctx, "config", task, err)
	// reconcileDisks: not awaited there; here it is, to see that it works.
	task, err = get().ResizeDisk(ctx, "scsi0", "10G")
	done(t, ctx, "resize", task, err)
	task, err = get().AddTag(ctx, "ip_net0_192.0.2.20")
	done(t, ctx, "tag", task, err)
	// bootstrap data
	vm = get()
	if err := vm.CloudInit(ctx, "ide0", "#cloud-config\n", "instance-id: x\n", "", ""); err != nil {
		t.Fatalf("cloud-init: %v", err)
	}
	vm = get()
	iso := fmt.Sprintf("iso/user-data-%d.iso,media=cdrom", id)
	if !strings.HasSuffix(strings.Split(vm.VirtualMachineConfig.IDEs["ide0"], ",size=")[0], iso) {
		t.Fatalf("ide0: %q", vm.VirtualMachineConfig.IDEs["ide0"])
	}
	if !strings.HasSuffix(vm.VirtualMachineConfig.Boot, ";ide0") {
		t.Fatalf("boot: %q", vm.VirtualMachineConfig.Boot)
	}
	// power on, then what the machine says of itself
	task, err = vm.Start(ctx)
	done(t, ctx, "start", task, err)
	vm = get()
	if err := vm.WaitForAgent(ctx, 5); err != nil {
		t.Fatal(err)
	}
	s.fault(map[string]any{"fault": "agent_exec", "command": "cloud-init status", "out": "status: done\n"})
	pid := must[int](t, "exec")(vm.AgentExec(ctx, []string{"cloud-init", "status"}, ""))
	status := must[*proxmox.AgentExecStatus](t, "exec-status")(vm.WaitForAgentExecExit(ctx, pid, 2))
	if status.Exited != 1 || status.ExitCode != 0 || !strings.Contains(status.OutData, "done") {
		t.Fatalf("%+v", status)
	}
	// the ISO image goes
	if err := vm.UnmountCloudInitISO(ctx, "ide0"); err != nil {
		t.Fatalf("unmount: %v", err)
	}
	vm = get()
	if vm.HasTag(proxmox.MakeTag(proxmox.TagCloudInit)) {
		task, err = vm.RemoveTag(ctx, proxmox.MakeTag(proxmox.TagCloudInit))
		done(t, ctx, "tag", task, err)
	}

	// DeleteVM: a stop that is not awaited, so the first try may find the machine running.
	var last error
	for range 20 {
		node := (&proxmox.Node{}).New(c, "pve2")
		if err := node.Status(ctx); err != nil {
			t.Fatal(err)
		}
		if must[bool](t, "checkid")(cluster.CheckID(ctx, id)) {
			last = nil
			break
		}
		vm, err := node.VirtualMachine(ctx, id)
		if err != nil {
			last = err
			continue
		}
		if vm.IsRunning() {
			if _, err = vm.Stop(ctx); err != nil {
				t.Fatal(err)
			}
		}
		_, last = vm.Delete(ctx, nil)
		time.Sleep(100 * time.Millisecond)
	}
	if last != nil {
		t.Fatalf("delete: %v", last)
	}
	if left := s.volumes(); len(left) != 1 || !strings.Contains(left[0], "base-9000") {
		t.Fatalf("volumes: %v", left)
	}
	// The order of the calls that change something.
	var writes []string
	for _, call := range s.calls()[before:] {
		if !strings.HasPrefix(call, "GET ") {
			writes = append(writes, strings.ReplaceAll(call, fmt.Sprint(id), "ID"))
		}
	}
	want := []string{
		"POST /nodes/pve1/qemu/9000/clone", "POST /nodes/pve2/qemu/ID/config", "PUT /nodes/pve2/qemu/ID/resize",
		"POST /nodes/pve2/qemu/ID/config", "POST /nodes/pve2/storage/local/upload",
	}
	if len(writes) < len(want) || !slices.Equal(writes[:len(want)], want) {
		t.Fatalf("%v", writes)
	}
}
