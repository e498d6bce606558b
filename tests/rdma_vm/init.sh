#!/bin/busybox sh
# The guest's first program: a soft RDMA card over Debian's stock kernel, then the tests, in the host's own file system.
# What it prints between `@begin` and `@end` is read by tests/rdma_vm.

say() { echo "@$*"; }

/bin/busybox mkdir -p /proc /sys /dev /host /extra /scratch /tree
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules.order); do insmod "/modules/$module" || say "failed insmod $module"; done

# The host's files, unchanged and unchangeable; on top of them the verbs drivers, and whatever is written here.
options=trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144
mount -t 9p -o $options host /host || say "failed mount host"
mount -t 9p -o $options extra /extra || say "failed mount extra"
mount -t tmpfs tmpfs /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/extra:/host,upperdir=/scratch/upper,workdir=/scratch/work overlay /tree || say "failed mount tree"
for folder in proc sys dev; do mount --move /$folder /tree/$folder; done
mount -t tmpfs tmpfs /tree/tmp
mkdir -p /tree/dev/shm
mount -t tmpfs tmpfs /tree/dev/shm

cat > /tree/tmp/run.sh <<'RUN'
counter() { cat "/sys/class/infiniband/rxe0/ports/1/hw_counters/$1"; }
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
ip link set lo up
ip link add rdma0 type dummy
ip link set rdma0 address 02:00:00:00:00:01
ip address add 10.77.0.1/24 dev rdma0
ip link set rdma0 mtu 9000 up
rdma link add rxe0 type rxe netdev rdma0 || echo "@failed to add a soft RDMA card"
rdma link show
cat /sys/class/infiniband/rxe0/ports/1/state
. /tmp/settings
# NIXL's wheel brings a libibverbs that looks for drivers in Red Hat's folders; the guest's own takes its place.
ln -sf /usr/lib/x86_64-linux-gnu/libibverbs.so.1 "$VERBS_OF_WHEEL"
echo "@begin $(uname -r)"
sent=$(counter sent_pkts)
ulimit -l unlimited
if [ -n "$MANAGERS" ]; then
  "$MANAGERS" --bench defragment nixl
  echo "@managers $?"
  echo "@packets $(($(counter sent_pkts) - sent))"
else
  ORCHESTRA_TEST_VERBS=1 "$TRANSPORTS" nixl --test-threads 1 --color never
  echo "@transports $?"
  echo "@packets $(($(counter sent_pkts) - sent))"
  ORCHESTRA_TEST_VERBS=1 "$MEMLOCK" --test-threads 1 --color never
  echo "@memlock $?"
fi
echo "@end $(cut -d ' ' -f 1 /proc/uptime)"
RUN
cp /settings /tree/tmp/settings
chroot /tree /bin/sh /tmp/run.sh
sync
poweroff -f
