package clients

import (
	"os"
	"strings"
	"testing"

	"github.com/bpg/terraform-provider-proxmox/proxmox/access"
	"github.com/bpg/terraform-provider-proxmox/proxmox/api"
	"github.com/bpg/terraform-provider-proxmox/proxmox/cluster"
	"github.com/bpg/terraform-provider-proxmox/proxmox/nodes"
	"github.com/bpg/terraform-provider-proxmox/proxmox/nodes/vms"
	"github.com/bpg/terraform-provider-proxmox/proxmox/pools"
	"github.com/bpg/terraform-provider-proxmox/proxmox/types"
	"github.com/bpg/terraform-provider-proxmox/proxmox/version"
)

// terraform is the client of the Terraform provider bpg/proxmox.
func terraform(t *testing.T, s *sim, credentials api.Credentials) api.Client {
	t.Helper()
	connection, err := api.NewConnection(s.URL, true, "1.3")
	if err != nil {
		t.Fatal(err)
	}
	client, err := api.NewClient(credentials, connection)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func ok(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func TestTerraformProviderLivesThroughAVirtualMachine(t *testing.T) {
	for name, arguments := range map[string][6]string{
		"token":  {"", "", "", tokenID + "=" + tokenSecret, "", ""},
		"ticket": {"root@pam", password, "", "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, ctx := start(t), within(t)
			credentials, err := api.NewCredentials(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5])
			ok(t, "credentials", err)
			c := terraform(t, s, credentials)

			release, err := (&version.Client{Client: c}).Version(ctx)
			ok(t, "version", err)
			if release.Release != "9.2" {
				t.Fatalf("release %q", release.Release)
			}
			ok(t, "pool", (&pools.Client{Client: c}).CreatePool(ctx, &pools.PoolCreateRequestBody{ID: "tf"}))

			one := &nodes.Client{Client: c, NodeName: "pve1"}
			template := one.VM(9000)
			ok(t, "template", template.ConvertToTemplate(ctx).Err())
			id, err := (&cluster.Client{Client: c}).GetNextID(ctx, nil)
			ok(t, "nextid", err)
			vmName, full := "tf-1", types.CustomBool(true)
			ok(t, "clone", template.CloneVM(ctx, 3, &vms.CloneRequestBody{VMIDNew: *id, Name: &vmName, FullCopy: &full}).Err())

			vm := one.VM(*id)
			ok(t, "unlock", vm.WaitForVMConfigUnlock(ctx, true))
			cores, memory := int64(2), 2048
			ok(t, "update", vm.UpdateVM(ctx, &vms.UpdateRequestBody{CPUCores: &cores, DedicatedMemory: &memory}))
			config, err := vm.GetVM(ctx)
			ok(t, "config", err)
			if config.CPUCores == nil || *config.CPUCores != 2 {
				t.Fatalf("cores %v", config.CPUCores)
			}
			ok(t, "resize", vm.ResizeVMDisk(ctx, &vms.ResizeDiskRequestBody{Disk: "scsi0", Size: *types.DiskSizeFromGigabytes(8)}).Err())
			ok(t, "start", vm.StartVM(ctx, 30).Err())
			ok(t, "running", vm.WaitForVMStatus(ctx, "running"))
			_, err = vm.GetVMNetworkInterfacesFromAgent(ctx)
			ok(t, "agent", err)
			online := types.CustomBool(true)
			ok(t, "migrate", vm.MigrateVM(ctx, &vms.MigrateRequestBody{TargetNode: "pve2", OnlineMigration: &online}).Err())
			where, err := (&cluster.Client{Client: c}).GetVMNodeName(ctx, *id)
			ok(t, "node", err)
			if *where != "pve2" {
				t.Fatalf("on %s", *where)
			}
			vm = (&nodes.Client{Client: c, NodeName: "pve2"}).VM(*id)
			ok(t, "reboot", vm.RebootVM(ctx, &vms.RebootRequestBody{}).Err())

			file, err := os.CreateTemp(t.TempDir(), "image")
			ok(t, "file", err)
			_, err = file.WriteString("an image")
			ok(t, "file", err)
			_, err = file.Seek(0, 0)
			ok(t, "file", err)
			upload := &api.FileUploadRequest{ContentType: "iso", FileName: "tf.iso", File: file}
			_, err = one.Storage("local").APIUpload(ctx, upload, t.TempDir())
			ok(t, "upload", err)
			files, err := one.Storage("local").ListDatastoreFiles(ctx, nil)
			ok(t, "files", err)
			found := false
			for _, entry := range files {
				found = found || strings.HasSuffix(entry.VolumeID, "iso/tf.iso")
			}
			if !found {
				t.Fatal("the upload is not listed")
			}
			ok(t, "delete the upload", one.Storage("local").DeleteDatastoreFile(ctx, "iso/tf.iso"))

			force := types.CustomBool(true)
			ok(t, "shutdown", vm.ShutdownVM(ctx, &vms.ShutdownRequestBody{ForceStop: &force}).Err())
			ok(t, "destroy", vm.DeleteVM(ctx, true, true).Err())
			ok(t, "pool", (&pools.Client{Client: c}).DeletePool(ctx, "tf"))
		})
	}
}

func TestTerraformProviderManagesAccess(t *testing.T) {
	s, ctx := start(t), within(t)
	credentials, err := api.NewCredentials("", "", "", tokenID+"="+tokenSecret, "", "")
	ok(t, "credentials", err)
	c := &access.Client{Client: terraform(t, s, credentials)}
	ok(t, "role", c.CreateRole(ctx, &access.RoleCreateRequestBody{ID: "Look", Privileges: types.CustomPrivileges{"VM.Audit"}}))
	enabled := types.CustomBool(true)
	ok(t, "user", c.CreateUser(ctx, &access.UserCreateRequestBody{ID: "tf@pve", Password: "long-enough", Enabled: &enabled}))
	ok(t, "group", c.CreateGroup(ctx, &access.GroupCreateRequestBody{ID: "tf"}))
	user, propagate := "tf@pve", types.CustomBool(true)
	ok(t, "acl", c.UpdateACL(ctx, &access.ACLUpdateRequestBody{Path: "/vms", Roles: []string{"Look"}, Users: []string{user}, Propagate: &propagate}))
	entries, err := c.GetACL(ctx)
	ok(t, "acl", err)
	found := false
	for _, entry := range entries {
		found = found || entry.Path == "/vms" && entry.RoleID == "Look"
	}
	if !found {
		t.Fatalf("%+v", entries)
	}
	secret, err := c.CreateUserToken(ctx, user, "t1", &access.UserTokenCreateRequestBody{})
	ok(t, "token", err)
	if !strings.HasPrefix(secret, "tf@pve!t1=") {
		t.Fatalf("token %q", secret)
	}
	ok(t, "token", c.DeleteUserToken(ctx, user, "t1"))
	ok(t, "group", c.DeleteGroup(ctx, "tf"))
	ok(t, "user", c.DeleteUser(ctx, user))
	ok(t, "role", c.DeleteRole(ctx, "Look"))
}
