//! VFIO's mode for machines without an IOMMU: `patched` has it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vfio_remap::device::{BufferRequest, DmaSpace, Interrupt, IovaPlacement};
use vfio_remap::transport::{Binding, Vfio, VfioOptions};
use vfio_remap::{Device, Error, ErrorKind};

use crate::{lab, leftovers};
use vfio_remap_edu::Edu;

pub const SWITCH: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// The mode is on, and edu bound in it, as long as this lives.
struct Mode(Option<Binding>);

impl Mode {
    fn enter() -> Self {
        fs::write(SWITCH, "Y").unwrap();
        Self(Some(lab::sysfs("edu").bind_vfio_pci().unwrap()))
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        self.0 = None;
        fs::write(SWITCH, "N").unwrap();
    }
}

pub fn open(options: VfioOptions<'_>) -> Result<Vfio, Error> {
    // SAFETY: the tests tell edu of no addresses but those of live mappings, and wait until it has done
    // what it was told.
    unsafe { options.open_noiommu(lab::address("edu")) }
}

fn device(options: VfioOptions<'_>) -> Device {
    Device::new(Arc::new(open(options).unwrap()))
}

#[test]
fn without_iommu_safe_code_does_not_get_the_device() {
    let _mode = Mode::enter();
    let edu = lab::address("edu");
    leftovers::none_of(|| {
        for way in [Vfio::options(), Vfio::options().by_group(), Vfio::options().by_cdev()] {
            let error = way.open(edu).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoIommu, "{error}");
            for words in ["no IOMMU confines it", "intel_iommu=on", "Vfio::open_noiommu"] {
                assert!(error.to_string().contains(words), "{error}");
            }
        }
    });
}

#[test]
fn without_iommu_edu_interrupts_by_its_group() {
    let _mode = Mode::enter();
    for interrupt in [Interrupt::Intx, Interrupt::Msi] {
        leftovers::none_of(|| {
            let edu = device(Vfio::options().by_group());
            edu.config().unwrap().set_memory_decoding(true).unwrap();
            // A message is a write to memory, as DMA is.
            edu.config().unwrap().set_bus_mastering(true).unwrap();
            let window = lab::map_all(&edu, 0);
            let register = |offset| window.register::<u32>(offset).unwrap();
            assert_eq!(register(0).read(), lab::EDU_ID);
            let vectors = edu.vectors(interrupt, 1).unwrap();
            for cause in 1..100 {
                register(0x60).write(cause);
                assert_eq!(vectors.wait(0, Duration::from_secs(10)).unwrap(), 1);
                assert_eq!(register(0x24).read(), cause);
                register(0x64).write(cause);
                if interrupt == Interrupt::Intx {
                    vectors.set_masked(0, false).unwrap();
                }
            }
            let error = edu.dma().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            for words in ["no IOMMU translates", "enable the IOMMU", "Linux 7.3"] {
                assert!(error.to_string().contains(words), "{error}");
            }
            drop((vectors, window));
            edu.close().unwrap();
        });
    }
}

/// Huge pages for the pool, as long as this lives.
struct HugePages;

impl HugePages {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn new() -> Self {
        fs::write(Self::POOL, "4").unwrap();
        Self
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(Self::POOL, "0").unwrap();
    }
}

#[test]
fn without_iommu_edu_does_dma_through_its_own_file() {
    let _mode = Mode::enter();
    let _pages = HugePages::new();
    // It is the way that is taken unasked, too.
    for (way, interrupt) in
        [(Vfio::options().by_cdev(), Interrupt::Msi), (Vfio::options(), Interrupt::Intx)]
    {
        leftovers::none_of(|| {
            let request = BufferRequest::new(8192).huge_pages();
            let edu = Edu::with_buffer(device(way), interrupt, request).unwrap();
            assert!(edu.buffer().has_huge_pages());
            assert_eq!(edu.factorial(12).unwrap(), 479_001_600);
            let pattern: Vec<u8> = (0..4096u32).map(|n| (n * 7 + 3) as u8).collect();
            edu.buffer().write(0, &pattern);
            edu.there_and_back(0, 4096, 4096).unwrap();
            let mut back = vec![0; 4096];
            edu.buffer().read(4096, &mut back);
            assert_eq!(back, pattern);
            edu.close().unwrap();
        });
    }
}

#[test]
fn without_iommu_memory_is_at_its_physical_address_only() {
    let _mode = Mode::enter();
    leftovers::none_of(|| {
        let edu = device(Vfio::options());
        let space: DmaSpace = edu.dma().unwrap();
        let page = space.buffer(4096).unwrap();
        // The same memory once more is at the same place, and stays there when one mapping goes.
        let again = space
            .map(page.memory(), IovaPlacement::default(), vfio_remap::space::Access::ReadOnly)
            .unwrap();
        assert_eq!(again.iova(), page.iova());
        assert_eq!(space.mapping_count(), 2);
        drop(again);
        let refused = |request: BufferRequest, kind, words: &str| {
            let error = leftovers::none_of(|| space.buffer_with(request).unwrap_err());
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(space.mapping_count(), 1);
        };
        let placed = |placement| BufferRequest::new(4096).placement(placement);
        // The first page of all is the firmware's.
        let low = IovaPlacement::up_to(0xfff);
        refused(placed(low), ErrorKind::OutOfRange, "the memory is at 0x");
        refused(placed(IovaPlacement::SameAsAddress), ErrorKind::OutOfRange, "no IOMMU translates");
        refused(BufferRequest::new(64 << 20), ErrorKind::Unsupported, "vm.nr_hugepages");
        drop((page, space));
        edu.close().unwrap();
    });
}

#[test]
fn without_iommu_a_user_without_the_capability_is_refused() {
    let _mode = Mode::enter();
    let mut nodes: Vec<PathBuf> = vec!["/dev/vfio/vfio".into(), "/dev/iommu".into()];
    for directory in ["/dev/vfio", "/dev/vfio/devices"] {
        let entries = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
        nodes.extend(entries.filter(|path| path.display().to_string().contains("noiommu-")));
    }
    assert_eq!(nodes.len(), 4, "{nodes:?}");
    for node in &nodes {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(node, fs::Permissions::from_mode(0o666)).unwrap();
    }
    let status = lab::child("noiommu_mode::is_not_capable", &[], Some(65534));
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "a child of the test above: it runs as nobody"]
fn is_not_capable() {
    for way in [Vfio::options(), Vfio::options().by_group(), Vfio::options().by_cdev()] {
        let error = leftovers::none_of(|| open(way).unwrap_err());
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("CAP_SYS_RAWIO"), "{error}");
    }
}
