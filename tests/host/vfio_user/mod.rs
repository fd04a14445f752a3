//! Clients and servers of vfio-user: ours, others', and hostile ones.

mod bars;
mod both_ends;
mod client_memory;
mod cost;
mod few_mappings;
mod hostile_clients;
mod hostile_servers;
mod idle;
mod interop;
mod interrupts;
mod late;
mod leftovers;
mod protocol;
mod regions;
mod second_client;
mod unread;
mod version;
