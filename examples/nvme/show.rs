//! `nvme identify`.

use serde_json::{Value, json};
use vfio_remap::Result;

use crate::options::Options;
use crate::session::open_controller;
use vfio_remap_nvme::{Controller, Health, Identity, Namespace, Settings};

/// Prints the identity, the namespaces, or the one that was named, and the health of the controller.
pub fn identify(options: &Options) -> Result<()> {
    let (controller, _process) = open_controller(&options.common, Settings::default())?;
    let namespaces: Vec<Result<Namespace>> = match options.common.namespace {
        Some(id) => vec![Ok(controller.namespace(id)?)],
        None => controller.namespaces()?.into_iter().map(|id| controller.namespace(id)).collect(),
    };
    let health = controller.health()?;
    let errors = controller.errors()?.len();
    if options.common.json {
        say!("{}", as_json(&controller, &namespaces, &health, errors)?);
    } else {
        print(&controller, &namespaces, &health, errors)?;
    }
    Ok(controller.close()?)
}

fn as_json(
    controller: &Controller,
    namespaces: &[Result<Namespace>],
    health: &Health,
    errors: usize,
) -> Result<Value> {
    let Identity { vendor, serial, model, firmware, max_transfer, .. } = controller.identity();
    let (stride, pairs) = (controller.doorbell_stride(), controller.queues_per_doorbell_page());
    let namespaces: Vec<Value> = namespaces
        .iter()
        .map(|namespace| match namespace {
            Ok(namespace) => json!({
                "id": namespace.id(), "blocks": namespace.block_count(),
                "block_size": namespace.block_size(),
            }),
            Err(error) => json!({"error": error.to_string()}),
        })
        .collect();
    Ok(json!({
        "device": controller.name(), "version": controller.version()?, "vendor": vendor,
        "model": model, "serial": serial, "firmware": firmware, "max_transfer": max_transfer,
        "write_cache": controller.write_cache()?, "doorbell_stride": stride,
        "queue_pairs_on_a_doorbell_page": pairs, "namespaces": namespaces,
        "health": {"warnings": health.warnings, "temperature_kelvin": health.temperature,
            "spare_percent": health.spare, "used_percent": health.used,
            "power_on_hours": health.power_on_hours as f64,
            "unsafe_shutdowns": health.unsafe_shutdowns as f64,
            "media_errors": health.media_errors as f64},
        "errors_logged": errors,
    }))
}

fn print(
    controller: &Controller,
    namespaces: &[Result<Namespace>],
    health: &Health,
    errors: usize,
) -> Result<()> {
    let identity = controller.identity();
    let Identity { vendor, serial, model, firmware, max_transfer, .. } = identity;
    say!("{}: NVMe {}", controller.name(), controller.version()?);
    say!("  {model}, serial number {serial}, firmware {firmware}, vendor {vendor:#06x}");
    say!("  a command transfers at most {} KiB", max_transfer >> 10);
    let offers =
        [(identity.has_write_zeroes, "Write Zeroes"), (identity.has_deallocate, "Deallocate")];
    let offered: Vec<_> = offers.iter().filter(|(has, _)| *has).map(|(_, name)| *name).collect();
    say!("  beyond Read, Write and Flush: {}", or_none(&offered.join(", ")));
    let cache = match (identity.has_write_cache, controller.write_cache()?) {
        (false, _) => "none: completed writes are durable",
        (true, true) => "enabled: flushed writes are durable",
        (true, false) => "disabled",
    };
    say!("  volatile write cache: {cache}");
    let (stride, pairs) = (controller.doorbell_stride(), controller.queues_per_doorbell_page());
    say!("  doorbells {stride} bytes apart: those of {pairs} pairs of queues share a page");
    for namespace in namespaces {
        match namespace {
            Ok(namespace) => say!(
                "  namespace {}: {} blocks of {} bytes, {:.1} MiB",
                namespace.id(),
                namespace.block_count(),
                namespace.block_size(),
                namespace.size() as f64 / f64::from(1 << 20)
            ),
            Err(error) => say!("  {error}"),
        }
    }
    say!(
        "  health: {} °C, {} % of the spare left, {} % of its life used, {} media errors, {errors} errors logged{}",
        i32::from(health.temperature) - 273,
        health.spare,
        health.used,
        health.media_errors,
        if health.warnings == 0 {
            String::new()
        } else {
            format!(", WARNINGS {:#04x}", health.warnings)
        }
    );
    Ok(())
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "nothing" } else { text }
}
