/* Expert FFN on CPUs; filled in by the CPU kernel work. */
typedef int moe_cpu_experts_translation_unit;
