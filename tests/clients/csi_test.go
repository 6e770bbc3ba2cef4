package clients

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"

	proxmox "github.com/luthermonson/go-proxmox"
)

// The calls of sergelogvinov/proxmox-csi-plugin for a volume that comes and goes, in its order, with its five
// privileges: `CreateVolume`, `ControllerPublishVolume`, `ControllerExpandVolume`, `ControllerUnpublishVolume` and
// `DeleteVolume` of its `pkg/csi/controller.go`.
func TestTheFormerCSIDriverMakesAttachesGrowsAndDeletesAVolume(t *testing.T) {
	s, ctx := start(t), within(t)
	c := client(s, "csi@pve!csi", "11111111-2222-4333-8444-555555555557")
	s.running(t, ctx, 9000)
	for _, storage := range []struct{ id, disk string }{
		{"shared", "9999/vm-9999-pvc-1.raw"},
		{"local", "9999/vm-9999-pvc-2.raw"},
	} {
		t.Run(storage.id, func(t *testing.T) {
			before := len(s.calls())
			driver := formerDriver{c: c, storage: storage.id, disk: storage.disk, node: "pve1"}
			driver.create(t, ctx, 1<<30)
			device := driver.attach(t, ctx, 9000)
			wwn := "0x" + hex.EncodeToString(fmt.Appendf(nil, "PVC-ID%02d", 1))
			if device != "scsi1" || !strings.Contains(driver.config(t, ctx, 9000)[device], "wwn="+wwn) {
				t.Fatalf("%s: %v", device, driver.config(t, ctx, 9000))
			}
			driver.expand(t, ctx, 2<<30)
			if size := driver.size(t, ctx); size != 2<<30 {
				t.Fatalf("size %d", size)
			}
			driver.detach(t, ctx, 9000)
			// A repeated call finds nothing to do.
			driver.detach(t, ctx, 9000)
			driver.delete(t, ctx)
			if left := s.volumes(); slices.Contains(left, storage.id+":"+storage.disk) {
				t.Fatalf("volumes: %v", left)
			}
			var writes []string
			for _, call := range s.calls()[before:] {
				if !strings.HasPrefix(call, "GET ") {
					writes = append(writes, strings.SplitN(call, " ", 2)[0]+" "+call[strings.LastIndex(call, "/")+1:])
				}
			}
			want := []string{"POST content", "POST config", "PUT resize", "PUT unlink?idlist=scsi1",
				"DELETE " + storage.disk[strings.LastIndex(storage.disk, "/")+1:]}
			for index := range want {
				if index >= len(writes) || !strings.HasPrefix(writes[index], strings.Split(want[index], "?")[0]) {
					t.Fatalf("%v, not %v", writes, want)
				}
			}
		})
	}
}

// running starts a VM as root.
func (s *sim) running(t *testing.T, ctx context.Context, id int) {
	t.Helper()
	root := client(s, tokenID, tokenSecret)
	vm := must[*proxmox.VirtualMachine](t, "vm")((&proxmox.Node{}).New(root, "pve1").VirtualMachine(ctx, id))
	task, err := vm.Start(ctx)
	done(t, ctx, "start", task, err)
}

// formerDriver asks what that driver asks.
type formerDriver struct {
	c                   *proxmox.Client
	storage, disk, node string
}

func (d *formerDriver) resources(t *testing.T, ctx context.Context, kind string) proxmox.ClusterResources {
	t.Helper()
	return must[proxmox.ClusterResources](t, "resources")((&proxmox.Cluster{}).New(d.c).Resources(ctx, kind))
}

// vm is `GetVMConfig`: where it is, its status, its config.
func (d *formerDriver) vm(t *testing.T, ctx context.Context, id int) *proxmox.VirtualMachine {
	t.Helper()
	for _, resource := range d.resources(t, ctx, "vm") {
		if resource.VMID == uint64(id) {
			vm := &proxmox.VirtualMachine{}
			vm.New(d.c, resource.Node, id)
			if err := vm.Ping(ctx); err != nil {
				t.Fatal(err)
			}
			path := fmt.Sprintf("/nodes/%s/qemu/%d/config", resource.Node, id)
			if err := d.c.Get(ctx, path, &vm.VirtualMachineConfig); err != nil {
				t.Fatal(err)
			}
			return vm
		}
	}
	t.Fatalf("no VM %d", id)
	return nil
}

func (d *formerDriver) config(t *testing.T, ctx context.Context, id int) map[string]string {
	t.Helper()
	return d.vm(t, ctx, id).VirtualMachineConfig.SCSIs
}

// size is `getVolumeSize`: the storage's status, then all of its contents.
func (d *formerDriver) size(t *testing.T, ctx context.Context) uint64 {
	t.Helper()
	base := fmt.Sprintf("/nodes/%s/storage/%s", d.node, d.storage)
	var status proxmox.Storage
	if err := d.c.Get(ctx, base+"/status", &status); err != nil {
		t.Fatal(err)
	}
	var contents []*proxmox.StorageContent
	if err := d.c.Get(ctx, base+"/content", &contents); err != nil {
		t.Fatal(err)
	}
	for _, content := range contents {
		if content.Volid == d.storage+":"+d.disk {
			return uint64(content.Size)
		}
	}
	return 0
}

func (d *formerDriver) create(t *testing.T, ctx context.Context, size int64) {
	t.Helper()
	available := 0
	for _, resource := range d.resources(t, ctx, "storage") {
		if resource.Storage == d.storage && resource.Status == "available" {
			available++
		}
	}
	if available == 0 {
		t.Fatalf("no node has %s", d.storage)
	}
	if d.size(t, ctx) != 0 {
		t.Fatal("the volume is there already")
	}
	var name string
	params := map[string]any{
		"vmid": 9999, "node": d.node, "storage": d.storage, "filename": d.disk[strings.LastIndex(d.disk, "/")+1:],
		"size": fmt.Sprintf("%d", size/1024),
	}
	if err := d.c.Post(ctx, fmt.Sprintf("/nodes/%s/storage/%s/content", d.node, d.storage), params, &name); err != nil {
		t.Fatal(err)
	}
	if name != d.storage+":"+d.disk || d.size(t, ctx) != uint64(size) {
		t.Fatalf("%q of %d bytes", name, d.size(t, ctx))
	}
}

func (d *formerDriver) attach(t *testing.T, ctx context.Context, id int) string {
	t.Helper()
	vm := d.vm(t, ctx, id)
	for lun := 1; lun < 30; lun++ {
		device := fmt.Sprintf("scsi%d", lun)
		if vm.VirtualMachineConfig.SCSIs[device] != "" {
			continue
		}
		wwn := "0x" + hex.EncodeToString(fmt.Appendf(nil, "PVC-ID%02d", lun))
		task, err := vm.Config(ctx, proxmox.VirtualMachineOption{
			Name: device, Value: fmt.Sprintf("%s:%s,backup=0,iothread=1,wwn=%s", d.storage, d.disk, wwn),
		})
		done(t, ctx, "attach", task, err)
		if !strings.Contains(d.config(t, ctx, id)[device], d.disk) {
			t.Fatal("the disk is not attached")
		}
		return device
	}
	t.Fatal("no free slot")
	return ""
}

// expand finds the VM by looking at each one's config.
func (d *formerDriver) expand(t *testing.T, ctx context.Context, size int64) {
	t.Helper()
	for _, resource := range d.resources(t, ctx, "vm") {
		for device, disk := range d.config(t, ctx, int(resource.VMID)) {
			if strings.Contains(disk, d.disk) {
				vm := &proxmox.VirtualMachine{}
				vm.New(d.c, resource.Node, int(resource.VMID))
				if err := vm.Ping(ctx); err != nil {
					t.Fatal(err)
				}
				task, err := vm.ResizeDisk(ctx, device, fmt.Sprintf("%dM", size>>20))
				done(t, ctx, "resize", task, err)
				return
			}
		}
	}
	t.Fatal("nobody has the disk")
}

func (d *formerDriver) detach(t *testing.T, ctx context.Context, id int) {
	t.Helper()
	vm := d.vm(t, ctx, id)
	for device, disk := range vm.VirtualMachineConfig.SCSIs {
		if strings.Contains(disk, d.disk) {
			if _, err := vm.UnlinkDisk(ctx, device, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, disk := range d.config(t, ctx, id) {
		if strings.Contains(disk, d.disk) {
			t.Fatal("the disk is still attached")
		}
	}
}

func (d *formerDriver) delete(t *testing.T, ctx context.Context) {
	t.Helper()
	if d.size(t, ctx) == 0 {
		t.Fatal("the volume is not there")
	}
	var upid proxmox.UPID
	if err := d.c.Delete(ctx, fmt.Sprintf("/nodes/%s/storage/%s/content/%s", d.node, d.storage, d.disk), &upid); err != nil {
		t.Fatal(err)
	}
	done(t, ctx, "delete", proxmox.NewTask(upid, d.c), nil)
}
